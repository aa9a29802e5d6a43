"""What the README and docs/sharing.md promise a team, from fresh clones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from ffprune.stages.record import CURVES, LEVELS, REPAIRED, RESULTS, SEARCH_AGENT, STAGES
from tests.sharing.team import Clone, colleague
from tests.workspace import stages_run

pytestmark = pytest.mark.slow


def with_venv(clone: Clone) -> Clone:
    """`make` finds the environment of these tests as the clone's own."""
    venv = clone.folder / ".venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".installed").touch()
    return clone


def flip(file: Path) -> None:
    """One bit, as a failing disk does it: the file's time and rights stay."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.chmod(0o644)
    with file.open("r+b") as inside:  # not another file: links see it
        inside.write(data)
    file.chmod(stat.st_mode)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def own_store(clone: Clone, store: Path, copy: Path) -> Path:
    """A copy of the store, which the clone uses instead."""
    shutil.copytree(store, copy)
    clone.dvc("remote", "modify", "--local", "store", "url", str(copy))
    return copy


# --- it works ---


def test_make_pull_in_a_folder_with_spaces_and_then_nothing_runs(first: Clone, tmp_path: Path) -> None:
    clone = with_venv(colleague(first, tmp_path / "a folder with spaces", "--depth", "1"))
    said = clone.say("make", "pull")
    assert "outputs compared with dvc.lock" in said
    assert "not here" not in said
    assert clone.repro() == []
    assert clone.git("status", "--porcelain") == ""
    assert "Cached" in clone.ffprune("run")


def test_a_change_runs_what_it_concerns_and_fetches_what_that_needs(first: Clone, store: Path, tmp_path: Path) -> None:
    one, other = (with_venv(colleague(first, tmp_path / name)) for name in ("one", "other"))
    copy = own_store(one, store, tmp_path / "copy")
    other.dvc("remote", "modify", "--local", "store", "url", str(copy))
    one.set("ridge.damping", 0.1)
    assert one.repro("--pull", "--allow-missing") == ["ridge", "evaluate", "report"]
    for needless in (LEVELS, SEARCH_AGENT):
        assert not (one.folder / needless).exists()
        assert not (one.cache / one.entry(needless)).exists()

    # The numbers can be compared with those that git has.
    changed = json.loads(one.dvc("metrics", "diff", "--json"))[RESULTS]
    assert {"0.2.uniform+ridge.perplexity", "0.3.searched+ridge.perplexity"} <= set(changed)
    assert all("+ridge." in name for name in changed)

    # Nothing is committed: what was run travels by the run cache. report alone runs, since git keeps its numbers.
    one.say("make", "push")
    other.set("ridge.damping", 0.1)
    assert other.repro("--pull") == ["report"]
    assert (other.folder / RESULTS).read_bytes() == (one.folder / RESULTS).read_bytes()


def test_one_cache_for_all_on_a_host(first: Clone, tmp_path: Path) -> None:
    people = [colleague(first, tmp_path / name) for name in ("one", "other")]
    for clone in people:
        clone.dvc("cache", "dir", "--local", str(tmp_path / "shared cache"))
        clone.dvc("config", "--local", "cache.shared", "group")
    people[0].dvc("pull")
    people[1].dvc("checkout")
    one, other = (clone.folder / CURVES for clone in people)
    assert one.stat().st_ino == other.stat().st_ino
    assert one.stat().st_mode & 0o222 == 0
    assert [clone.repro() for clone in people] == [[], []]
    shared = (tmp_path / "shared cache" / people[0].entry(CURVES)).parent
    assert shared.stat().st_mode & 0o2070 == 0o2070  # the group may write, and what is made belongs to it

    # Both run the same at the same time.
    for clone in people:
        clone.set("report.dpi", 60)
    both = [clone.start(sys.executable, "-m", "dvc", "repro") for clone in people]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {"report"} == {name for text in said for name in stages_run(text)}
    for clone in people:
        assert "outputs compared" in clone.ffprune("verify")
        assert clone.repro() == []


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with one bucket, ``team``."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="team")
        yield address
        server.terminate()


def test_s3(first: Clone, s3: str, tmp_path: Path) -> None:
    one, other = (colleague(first, tmp_path / name) for name in ("one", "other"))
    one.dvc("pull")
    for clone in (one, other):
        clone.dvc("remote", "add", "--local", "bucket", "s3://team/ffprune")
        clone.dvc("remote", "modify", "--local", "bucket", "endpointurl", s3)
        clone.dvc("remote", "modify", "--local", "bucket", "verify", "true")
    assert "pushed" in one.dvc("push", "--run-cache", "-r", "bucket")
    other.dvc("pull", "--run-cache", "-r", "bucket")
    assert other.repro() == []
    assert "not here" not in other.ffprune("verify")

    # An object that was cut short on the way is refused, and the rest is there.
    third = colleague(other, tmp_path / "third")
    shutil.copy(other.folder / ".dvc" / "config.local", third.folder / ".dvc")
    boto3.client("s3", endpoint_url=s3).put_object(
        Bucket="team", Key=f"ffprune/{third.entry(CURVES).as_posix()}", Body=b"{"
    )
    assert CURVES in third.dvc("pull", "-r", "bucket", status=1)
    assert not (third.folder / CURVES).exists()


# --- it is refused ---


def test_a_flipped_bit_is_refused_by_the_next_stage_and_mended(first: Clone, tmp_path: Path) -> None:
    clone = colleague(first, tmp_path / "clone")
    clone.dvc("pull")
    whole = (clone.folder / CURVES).read_bytes()
    flip(clone.cache / clone.entry(CURVES))
    assert "up to date" in clone.dvc("status")  # why this test is here
    clone.set("report.dpi", 60)
    said = clone.dvc("repro", status=255)
    assert f"error: {CURVES}: the bytes are not those that dvc.lock records" in said
    assert "ffprune verify" in said
    assert str(clone.entry(CURVES)) in clone.ffprune("verify", status=2)
    clone.ffprune("verify", "--drop", status=2)
    assert clone.repro("--pull") == ["report"]
    assert (clone.folder / CURVES).read_bytes() == whole
    clone.ffprune("verify")


@pytest.mark.parametrize("verify", [False, True])
def test_a_truncated_object_in_the_store_is_not_taken(first: Clone, store: Path, tmp_path: Path, verify: bool) -> None:
    clone = with_venv(colleague(first, tmp_path / "clone"))
    cut = own_store(clone, store, tmp_path / "copy") / clone.entry(CURVES)
    cut.chmod(0o644)
    cut.write_bytes(cut.read_bytes()[:100])
    cut.chmod(0o444)  # as DVC leaves it, and trusts it
    if verify:
        clone.dvc("remote", "modify", "--local", "store", "verify", "true")
        assert CURVES in clone.say("make", "pull", status=2)
        assert not (clone.folder / CURVES).exists()
    else:
        said = clone.say("make", "pull", status=2)
        assert "found, damaged: 1" in said
        assert str(clone.entry(CURVES)) in said


def test_what_was_never_pushed_is_named(first: Clone, tmp_path: Path) -> None:
    clone = with_venv(colleague(first, tmp_path / "clone"))
    (tmp_path / "empty").mkdir()
    clone.dvc("remote", "modify", "--local", "store", "url", str(tmp_path / "empty"))
    said = clone.say("make", "pull", status=2)
    for stage in STAGES:
        assert all(out in said for out in stage.outs), stage.name


def test_a_store_that_lacks_a_file_is_refused_and_filled_again(first: Clone, store: Path, tmp_path: Path) -> None:
    one, other = (colleague(first, tmp_path / name) for name in ("one", "other"))
    one.dvc("pull")
    copy = own_store(one, store, tmp_path / "copy")
    other.dvc("remote", "modify", "--local", "store", "url", str(copy))
    listing = copy / one.entry(REPAIRED)
    key = next(file["md5"] for file in json.loads(listing.read_text()) if file["relpath"].endswith("safetensors"))
    (copy / "files" / "md5" / key[:2] / key[2:]).unlink()
    assert key in other.dvc("pull", status=1)
    assert not (other.folder / REPAIRED).exists()
    # DVC asks for a folder's list alone; docs/sharing.md says to delete it.
    assert "up to date" in one.dvc("push")
    listing.unlink()
    assert "2 files pushed" in one.dvc("push")
    other.dvc("pull")
    assert other.repro() == []


def test_two_in_one_folder_and_two_pushes_at_once(first: Clone, store: Path, tmp_path: Path) -> None:
    clone = colleague(first, tmp_path / "clone")
    clone.dvc("pull")
    running = clone.start(sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "report")
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("Running stage"):
            break
    assert "is busy" in clone.dvc("repro", "--force", "--single-item", "report", status=255)
    assert running.wait(400) == 0
    running.stdout.close()
    clone.ffprune("verify")

    clone.dvc("remote", "modify", "--local", "store", "url", str(tmp_path / "new"))
    pushes = [clone, colleague(first, tmp_path / "other")]
    pushes[1].dvc("pull")
    pushes[1].dvc("remote", "modify", "--local", "store", "url", str(tmp_path / "new"))
    both = [pusher.start(sys.executable, "-m", "dvc", "push") for pusher in pushes]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    third = colleague(first, tmp_path / "third")
    third.dvc("remote", "modify", "--local", "store", "url", str(tmp_path / "new"))
    third.dvc("pull")
    third.ffprune("verify")


def test_a_copy_without_git_is_refused_until_dvc_is_told(first: Clone, tmp_path: Path) -> None:
    clone = colleague(first, tmp_path / "clone")
    shutil.rmtree(clone.folder / ".git")
    for words in (["run"], ["verify"]):
        said = clone.ffprune(*words, status=2)
        assert "is not a git repository" in said
        assert "dvc config --local core.no_scm true" in said
        assert "Traceback" not in said
    assert "is not a git repository" in clone.dvc("repro", status=255)
    clone.dvc("config", "--local", "core.no_scm", "true")
    clone.dvc("pull")
    assert clone.repro() == []
