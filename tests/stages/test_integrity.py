"""Outputs and cache entries against dvc.lock, on a small cache written by hand as DVC writes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from ffprune.core.errors import ChecksumMismatch, MissingInput
from ffprune.stages import integrity
from ffprune.stages.integrity import check_code, check_inputs, content_hash, verify
from tests.toy import REPO

CACHE = Path("cache")
FILE, FOLDER = "data/sensitivity/curves.json", "models/pruned"


def digest(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def entry(key: str) -> Path:
    return CACHE / "files" / "md5" / key[:2] / key[2:]


def put(data: bytes, key: str | None = None) -> str:
    key = key or digest(data)
    entry(key).parent.mkdir(parents=True, exist_ok=True)
    entry(key).write_bytes(data)
    return key


@pytest.fixture(params=["hardlink", "symlink", "copy"])
def link(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workspace of one file and one folder of two, with the kind of link between it and the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integrity.time, "sleep", lambda _: None)
    contents = {FILE: b"curves", f"{FOLDER}/b/x.json": b"{}", f"{FOLDER}/a.json": b"[]"}
    join = {"hardlink": os.link, "symlink": os.symlink, "copy": shutil.copy}[str(request.param)]
    for name, data in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        join(entry(put(data)).absolute(), name)
    # DVC's own form of a folder's list.
    listed = [{"md5": digest(b"[]"), "relpath": "a.json"}, {"md5": digest(b"{}"), "relpath": "b/x.json"}]
    text = json.dumps(listed, sort_keys=True).encode()
    folder = put(text, f"{digest(text)}.dir")
    outs = [{"path": FILE, "md5": digest(b"curves")}, {"path": FOLDER, "md5": folder}, {"path": "absent", "md5": "0"}]
    Path("dvc.lock").write_text(json.dumps({"stages": {"made": {"outs": outs}}}))
    return str(request.param)


def test_what_is_as_recorded_passes(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    verify(CACHE, drop=False)
    assert "2 outputs compared" in (said := capsys.readouterr().out)
    assert "not here: absent" in said
    check_inputs([FILE, FOLDER, "a text of my own, which no stage made"])


def test_scripts_get_all_in_json_before_a_refusal(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    verify(CACHE, drop=False, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told.pop("bytes") > 0
    assert told == {"outputs": 2, "damaged": [], "changed": [], "absent": ["absent"], "dropped": False}
    Path(FILE).unlink()
    Path(FILE).write_text("mine")
    with pytest.raises(ChecksumMismatch, match="not what"):
        verify(CACHE, drop=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["changed"] == [FILE]
    damaged = entry(digest(b"[]"))
    damaged.unlink()
    damaged.write_bytes(b"[")
    with pytest.raises(ChecksumMismatch, match="deleted"):
        verify(CACHE, drop=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert str(damaged) in told["damaged"] and told["dropped"]


@pytest.mark.parametrize("path", [FILE, f"{FOLDER}/a.json"])
def test_a_flipped_bit_in_the_cache_is_found_and_can_be_dropped(link: str, path: str) -> None:
    damaged = entry(digest(Path(path).read_bytes()))
    stat = damaged.stat()
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    out = FOLDER if path.startswith(FOLDER) else FILE
    if link == "copy":
        check_inputs([out])
    else:
        with pytest.raises(ChecksumMismatch, match=f"{out}: the bytes are not those that dvc.lock records"):
            check_inputs([out])
    with pytest.raises(ChecksumMismatch, match=f"found, damaged: 1 .*{damaged}.*ffprune verify --drop"):
        verify(CACHE, drop=False)
    assert damaged.exists()
    with pytest.raises(ChecksumMismatch, match=f"deleted, damaged: 1 .*{damaged}.*dvc repro --pull"):
        verify(CACHE, drop=True)
    assert not damaged.exists()
    # A whole copy stays.
    assert Path(path).exists() == (link == "copy")
    assert sum(file.is_file() for file in [Path(FILE), Path(FOLDER, "a.json"), Path(FOLDER, "b/x.json")]) >= 2


def test_a_copy_of_a_damaged_entry_is_dropped_with_it(link: str) -> None:
    damaged = entry(digest(b"curves"))
    damaged.write_bytes(b"curve")
    if link == "copy":
        Path(FILE).write_bytes(b"curve")
    with pytest.raises(ChecksumMismatch, match="deleted"):
        verify(CACHE, drop=True)
    assert not Path(FILE).exists()


def test_a_file_changed_by_hand_is_told_apart_and_never_deleted(link: str) -> None:
    Path(FILE).unlink()
    Path(FILE).write_text("mine")
    for drop in (False, True):
        with pytest.raises(ChecksumMismatch, match=f"{FILE}: not what .*whole.*dvc checkout.*dvc commit"):
            verify(CACHE, drop)
    assert Path(FILE).read_text() == "mine"
    with pytest.raises(ChecksumMismatch, match="dvc commit -f sensitivity"):
        check_inputs([FILE])


def test_a_damaged_list_of_a_folder_is_found(link: str) -> None:
    entry(content_hash(Path(FOLDER))).write_text("[")
    with pytest.raises(ChecksumMismatch, match=r"found, damaged: 1 .*\.dir"):
        verify(CACHE, drop=False)


@pytest.mark.parametrize("text", ["", "cmd: ffprune rid", "outs: [", "- outs\n-"])
def test_an_entry_of_the_run_cache_that_was_cut_short_is_found(link: str, text: str) -> None:
    run = CACHE / "runs" / "ab" / "abc" / "def"
    run.parent.mkdir(parents=True)
    run.write_text("cmd: x\nouts:\n- path: y\n")
    verify(CACHE, drop=False)
    run.write_text(text)
    Path(FILE).unlink()
    Path(FILE).write_text(text)  # of a person's own, and by chance the same
    with pytest.raises(ChecksumMismatch, match="runs/ab/abc/def"):
        verify(CACHE, drop=True)
    assert not run.exists()
    assert Path(FILE).read_text() == text
    Path(FILE).unlink()
    verify(CACHE, drop=False)


def test_a_lock_file_read_while_it_is_written_is_read_again(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(whole.replace(digest(b"curves"), digest(b"curves")[:7]))
    monkeypatch.setattr(integrity.time, "sleep", lambda _: Path("dvc.lock").write_text(whole))
    check_inputs([FILE])


def test_without_a_lock_file_nothing_can_be_compared(link: str) -> None:
    Path("dvc.lock").unlink()
    with pytest.raises(MissingInput, match="no stage has run here"):
        verify(CACHE, drop=False)
    check_inputs([FILE])


def test_code_of_another_environment_is_not_run_for_the_projects(tmp_path: Path) -> None:
    check_code(tmp_path)  # a project without sources
    check_code(REPO)
    copy = tmp_path / "src" / "ffprune"
    shutil.copytree(REPO / "src" / "ffprune", copy, ignore=shutil.ignore_patterns("__pycache__"))
    check_code(tmp_path)  # as an experiment's temporary copy
    (copy / "evaluate" / "cloze.py").write_text("other = 1")
    with pytest.raises(ChecksumMismatch, match="activate the project's own environment"):
        check_code(tmp_path)
    shutil.rmtree(copy / "evaluate")
    with pytest.raises(ChecksumMismatch):
        check_code(tmp_path)
