"""Files that are whole or absent: a write fills a temporary neighbour, which then replaces the target.

What a killed process left of such a write is removed by the next one in the same folder.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffprune.core.errors import DiskFull, MissingInput, UnsafeFile
from ffprune.models.temporary import neighbour, remove_leftovers, replacing
from ffprune.stages.record import maker_of

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "ffprune"
# Libraries report a full disk in exceptions of their own: safetensors, and numpy before and while it writes.
_FULL = ("No space left on device", "Not enough free space", " requested and ")


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8)."""
    _write(path, lambda target: _write_bytes(target, text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, two spaces a level; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that :func:`write_json` wrote.

    Raises:
        MissingInput: there is no such file.
        UnsafeFile: it is not JSON.
    """
    try:
        return json.loads(require(path).read_text())
    except ValueError as error:
        raise _damaged(path, "JSON", error) from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows with a header line; ``columns`` is needed only when there may be no row."""
    names = list(columns if columns is not None else rows[0])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, down to the disk; a kill may cut short what is added, never what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _teaching_disk_full(path):
        _write_bytes(path, data, "ab")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as text values."""
    with require(path).open(newline="") as file:
        return list(csv.DictReader(file))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors; the same tensors and metadata make the same bytes."""
    from safetensors.torch import save_file

    check_room(path, sum(t.numel() * t.element_size() for t in tensors.values()))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors writes several entries in a random order: all go into one.
    one = {_METADATA: json.dumps(dict(sorted((metadata or {}).items())))}
    _write(path, lambda target: save_file(whole, target, metadata=one))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, mapped: what is never looked at is never read.

    Raises:
        MissingInput: there is no such file.
        UnsafeFile: it is damaged or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(require(path))
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, "safetensors", error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file (its tensors are not read)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require(path), framework="pt") as file:
            found: dict[str, str] = json.loads((file.metadata() or {})[_METADATA])
            return found
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, "safetensors", error) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A new file to write: it replaces ``path`` when the block ends, vanishes when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = neighbour(path)
    try:
        with _teaching_disk_full(path):
            temporary.touch(0o600, exist_ok=False)
            yield temporary
        # Private while it is written; outputs are shared through a team's cache.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A new folder to build in: it replaces ``path`` when the block ends, vanishes when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as built:
        built.chmod(0o755)
        with _teaching_disk_full(path):
            yield built


def require(path: Path) -> Path:
    """The path itself when it exists.

    Raises:
        MissingInput: it does not; the message names the stage that makes it.
    """
    if path.exists():
        return path
    maker = maker_of(path)
    raise MissingInput(
        f"{path} was asked for and does not exist",
        f"the stage '{maker}' makes it" if maker else "no stage of the pipeline makes it",
        f"run 'dvc repro {maker}'" if maker else "check the path in params.yaml",
    )


def check_room(path: Path, needed: int) -> None:
    """Refuse an output of ``needed`` bytes that the disk cannot hold, before work is spent on it.

    Raises:
        DiskFull: fewer bytes are free.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFull(
            f"{path} needs {needed / 1e6:,.0f} MB",
            f"the disk of {place} has {free / 1e6:,.0f} MB free",
            "free some room ('dvc gc -w' drops cached outputs that no longer belong to this workspace)",
        )


def _write(path: Path, write: Callable[[Path], None]) -> None:
    with atomic_file(path) as temporary:
        write(temporary)


def _write_bytes(path: Path, data: bytes, mode: str = "wb") -> None:
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _teaching_disk_full(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and not any(words in str(error) for words in _FULL):
            raise
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        raise DiskFull(
            f"writing {path} filled the disk",
            f"{free / 1e6:,.0f} MB are free; what was there before is untouched",
            "free some room ('dvc gc -w' drops cached outputs that no longer belong to this workspace)",
        ) from error


def _damaged(path: Path, kind: str, error: Exception) -> UnsafeFile:
    maker = maker_of(path)
    return UnsafeFile(
        f"{path} cannot be read as {kind}: {' '.join(str(error).split())}",
        "it is cut short, damaged or of another format",
        f"delete it and run 'dvc repro {maker}'" if maker else "delete it and get it again",
    )
