from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ffprune.core.errors import ChecksumMismatch, DiskFull, MissingInput, NoNetwork, UnsafeFile
from ffprune.sources import pypi
from ffprune.sources.base import PypiSource

MEMBER = "tiny/data/file.txt"
CONTENT = b"forty-two\n"
CONTENT_HASH = hashlib.sha256(CONTENT).hexdigest()


def write_wheel(folder: Path, content: bytes = CONTENT, name: str = "tiny-1.0-py3-none-any.whl") -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("../outside.txt", b"never extracted")
    return folder / name


def source(**changes: str | None) -> PypiSource:
    row = {"package": "tiny==1.0", "member": MEMBER, "member_sha256": CONTENT_HASH} | changes
    return PypiSource.model_validate(row)


class Registry:
    """Stands in for pip: delivers a wheel with the given content, and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.calls = content, 0

    def __call__(self, arguments: list[str], destination: Path, *_: object) -> tuple[int, str]:
        self.calls += 1
        write_wheel(destination, self.content)
        return 0, "Successfully downloaded tiny"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    fake = Registry()
    monkeypatch.setattr(pypi, "run_pip", fake)
    return fake


def test_only_the_member_is_extracted(registry: Registry, tmp_path: Path) -> None:
    path = pypi.fetch_member(source(), tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["file.txt", "tiny-1.0-py3-none-any.whl"]


def test_what_a_killed_download_left_is_removed(registry: Registry, tmp_path: Path) -> None:
    (folder := tmp_path / "pypi" / "tiny-1.0").mkdir(parents=True)
    name = "import sys, pathlib; from ffprune.models.temporary import neighbour; "
    name += "neighbour(pathlib.Path(sys.argv[1]) / 'download').mkdir()"
    subprocess.run([sys.executable, "-c", name, folder], check=True)
    assert len(list(folder.iterdir())) == 1
    pypi.fetch_member(source(), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["members", "tiny-1.0-py3-none-any.whl"]


def test_the_second_run_needs_no_registry(registry: Registry, tmp_path: Path) -> None:
    first = pypi.fetch_member(source(), tmp_path)
    assert pypi.fetch_member(source(), tmp_path) == first
    first.unlink()
    assert pypi.fetch_member(source(), tmp_path).read_bytes() == CONTENT
    assert registry.calls == 1


@pytest.mark.parametrize("damaged", ["*.whl", "members/**/*.txt"])
def test_a_damaged_cache_is_mended(registry: Registry, tmp_path: Path, damaged: str) -> None:
    wanted = hashlib.sha256(write_wheel(tmp_path).read_bytes()).hexdigest()
    cache = tmp_path / "cache"

    class SameWheel(Registry):
        def __call__(
            self, arguments: list[str], destination: Path, progress: pypi.Told | None = None
        ) -> tuple[int, str]:
            (destination / "tiny-1.0-py3-none-any.whl").write_bytes(
                (tmp_path / "tiny-1.0-py3-none-any.whl").read_bytes()
            )
            return 0, ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pypi, "run_pip", SameWheel())
        pypi.fetch_member(source(sha256=wanted), cache)
        for file in (cache / "pypi" / "tiny-1.0").glob(damaged):
            file.write_bytes(b"damaged")
        assert pypi.fetch_member(source(sha256=wanted), cache).read_bytes() == CONTENT


@pytest.mark.parametrize("key", ["sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused_and_told(registry: Registry, tmp_path: Path, key: str) -> None:
    wrong = "0" * 64
    with pytest.raises(ChecksumMismatch) as refusal:
        pypi.fetch_member(source(**{key: wrong}), tmp_path)
    assert wrong in str(refusal.value) and f"set {key}" in str(refusal.value)
    assert key == "sha256" or CONTENT_HASH in str(refusal.value)
    assert not list(tmp_path.rglob("*.txt")), "nothing unverified is left in place"


def test_a_wheel_that_is_no_zip_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def deliver(arguments: list[str], destination: Path, progress: pypi.Told | None = None) -> tuple[int, str]:
        (destination / "tiny-1.0-py3-none-any.whl").write_bytes(b"not a zip")
        return 0, ""

    monkeypatch.setattr(pypi, "run_pip", deliver)
    with pytest.raises(ChecksumMismatch, match="damaged"):
        pypi.fetch_member(source(), tmp_path)


@pytest.mark.parametrize("member", ["../outside.txt", "/etc/passwd", "a/../../b", "..\\b", "C:/b"])
def test_members_cannot_leave_their_folder(registry: Registry, tmp_path: Path, member: str) -> None:
    with pytest.raises(UnsafeFile):
        pypi.fetch_member(source(member=member), tmp_path)
    assert registry.calls == 0


def test_a_member_that_is_not_there_is_told(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="has no such member"):
        pypi.fetch_member(source(member="tiny/other.txt"), tmp_path)


def test_a_platform_without_wheel_takes_one_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def deliver(arguments: list[str], destination: Path, progress: pypi.Told | None = None) -> tuple[int, str]:
        asked.append(arguments)
        if len(asked) == 1:
            return 1, "ERROR: No matching distribution found for tiny==1.0"
        write_wheel(destination)
        return 0, ""

    monkeypatch.setattr(pypi, "run_pip", deliver)
    assert pypi.fetch_member(source(), tmp_path).read_bytes() == CONTENT
    assert any(option.startswith("--platform=") for option in asked[1])


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pypi, "run_pip", lambda *_: (1, "ERROR: [Errno 28] No space left on device"))
    with pytest.raises(DiskFull):
        pypi.fetch_member(source(), tmp_path)


@pytest.mark.slow
def test_a_real_pip_without_index_becomes_a_lesson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NoNetwork) as refusal:
        pypi.fetch_member(source(), tmp_path)
    assert "tiny==1.0" in str(refusal.value) and "pip config list" in str(refusal.value)


FAKE_PIP = """
import os, sys, time
from pathlib import Path
Path("asked.txt").write_text("\\n".join(sys.argv[1:]))
unpacked = Path(os.environ["TMPDIR"]) / "pip-unpack-1"
unpacked.mkdir()
print("  Downloading tiny-1.0-py3-none-any.whl (3.0 kB)", flush=True)
with (unpacked / "tiny-1.0-py3-none-any.whl").open("wb", 0) as wheel:
    wheel.write(bytes(1000))
    while not Path("seen").exists():
        time.sleep(0.01)
    wheel.write(bytes(2000))
print("a word of it", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python that is no Python: it answers as pip does that has loaded a third until somebody has seen it."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "python"
    script = tmp_path / "pip.py"
    script.write_text(FAKE_PIP)
    # By a shell: the first line of a script names no Python in a folder with a space.
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$@\"\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(pypi, "_SECONDS_BETWEEN_LOOKS", 0.02)


def test_a_download_tells_how_far_it_is(fake_pip: None, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if done:
            Path("seen").touch()

    (folder := tmp_path / "wheels").mkdir()
    status, output = pypi.run_pip(["tiny==1.0"], folder, progress)
    assert (1000, 3000) in told
    assert told == sorted(told)
    assert (status, "a word of it" in output) == (3, True)
    assert not list(folder.iterdir())


def test_pip_is_asked_for_one_wheel_without_dependencies(fake_pip: None, tmp_path: Path) -> None:
    Path("seen").touch()
    pypi.run_pip(["tiny==1.0"], tmp_path)
    asked = Path("asked.txt").read_text().splitlines()
    assert asked[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(asked)
    assert not any("index" in word or "http" in word for word in asked)


def test_pip_ends_with_who_waits_for_it(fake_pip: None, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pypi.run_pip(["tiny==1.0"], tmp_path, stop)
    assert not any(path.name.startswith(".pip-") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("  Downloading tiny-1.0-py3-none-any.whl (258.5 MB)", 258_500_000),
        ("Downloading https://x/tiny-1.0-py3-none-any.whl (12 kB)", 12_000),
        ("  Downloading tiny-1.0-py3-none-any.whl.metadata (2.5 kB)\n  Using cached tiny-1.0.whl (1.2 MB)", 1_200_000),
        ("Collecting tiny==1.0", 0),
    ],
)
def test_the_size_that_pip_announces_is_read(line: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "printed.txt").write_text(line)
    assert pypi._announced(tmp_path / "printed.txt") == size


def test_a_source_needs_a_checksum_and_a_pinned_version() -> None:
    refused: list[Callable[[], PypiSource]] = [
        lambda: source(member_sha256=None),
        lambda: source(package="tiny"),
        lambda: source(package="--index-url=x==1"),
        lambda: source(sha256="abc"),
    ]
    for build in refused:
        with pytest.raises(ValueError):
            build()
