"""A checksum inside a GGUF file, of everything else in it: numbers that changed look like any others.

It is metadata, which llama.cpp ignores and carries over when it quantises.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf

from ffprune.models.weights import CorruptModel

KEY = "ffprune.sha256"
_OPEN = "0" * 64
_CHUNK = 1 << 24


def add_seal(writer: gguf.GGUFWriter) -> None:
    """Make room for the checksum; :func:`close_seal` fills it in when the file is whole."""
    writer.add_string(KEY, _OPEN)


def close_seal(path: Path) -> None:
    """Compute the checksum of a file and put it where there is room for it."""
    place = _place(gguf.GGUFReader(path))
    assert place is not None  # its writer made room
    digest = _digest(path, place)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def check_seal(path: Path, reader: gguf.GGUFReader) -> bool:
    """Compare a file with its checksum.

    Args:
        path: the file.
        reader: of it.

    Returns:
        Whether there is a checksum; other programs write none.

    Raises:
        CorruptModel: the file is not what ffprune wrote.
    """
    place = _place(reader)
    if place is None:
        return False
    if reader.fields[KEY].contents() != _digest(path, place):
        raise CorruptModel(
            f"{path} is not as ffprune wrote it: its SHA-256 is not the one inside",
            "It was damaged or tampered with, or another program changed or quantised it",
            "Export it again, or fetch it again from where it was whole",
        )
    return True


def _place(reader: gguf.GGUFReader) -> int | None:
    """Offset of the checksum's 64 characters."""
    field = reader.fields.get(KEY)
    if field is None or len(field.parts[field.data[0]]) != len(_OPEN):
        return None
    return int(field.parts[field.data[0]].ctypes.data - reader.data.ctypes.data)


def _digest(path: Path, place: int) -> str:
    """SHA-256 of the file, the checksum's own characters read as zeros."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place) + _OPEN.encode())
        file.seek(place + len(_OPEN))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
