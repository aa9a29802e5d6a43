"""Temporary neighbours of what is being written. Their names say whose they are, so a killed process's can go.

A name is ``.TARGET.HOST-PID-RANDOM.ffprune``; HOST stands for the machine, and for the container on it, since both
count processes for themselves. What lies beside a neighbour while it is written has its name and an end more.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OLD = ".old"
_OURS = re.compile(r"\.+(?P<target>.+?)(?:\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.ffprune)+(?P<end>\.\w+)?")


def neighbour(path: Path) -> Path:
    """A new name beside ``path``, on the same disk, for what is to take its place."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.ffprune")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty neighbouring folder that takes the place of ``path`` when the block succeeds, else vanishes."""
    remove_leftovers(path.parent)
    built = neighbour(path)
    old = built.with_name(built.name + _OLD)
    built.mkdir()
    try:
        yield built
        # A folder cannot be renamed onto a full one: the old one steps aside.
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
        elif path.exists():
            path.replace(old)
        built.replace(path)
    finally:
        if old.exists():
            _settle(old, path)
        shutil.rmtree(built, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone were writing in a folder; a folder that had stepped aside goes back.

    Nothing is touched that has another kind of name, or that a living process or another machine may be writing.
    """
    with suppress(OSError):  # of a folder that cannot be listed, say: what is to be written matters more
        for path in folder.iterdir():
            # Most names need no closer look.
            found = _OURS.fullmatch(path.name) if ".ffprune" in path.name else None
            if found is None or found["host"] != _host() or _alive(int(found["pid"])):
                continue
            if found["end"] == _OLD:
                _settle(path, path.with_name(found["target"]))
            else:
                _remove(path)


def _settle(old: Path, path: Path) -> None:
    """Drop a folder that stepped aside; or put it back, where nothing took its place."""
    if path.exists():
        _remove(old)
    else:
        old.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def _host() -> str:
    # Names of machines repeat, and so does the number of their first namespace.
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return _short(" ".join(parts))


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:6]


def _alive(pid: int) -> bool:
    import psutil  # slow to import, rarely needed

    return psutil.pid_exists(pid)
