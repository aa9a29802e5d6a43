"""Rewards of a running search, a line each, on the disk before the next trial begins."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path

from ffprune.allocate.journal import Entry
from ffprune.core.outcome import Outcome, Samples
from ffprune.stages import artifacts


class SearchJournal:
    """A :class:`ffprune.allocate.journal.Journal` in a folder.

    A line is ``[checksum, entry]`` in JSON, in which Python's floats come back to the last bit and infinity does too.
    The checksum covers all lines up to its own: what a kill cut short, and whatever stands after a line that is
    damaged or missing, is not taken for an answer.

    Args:
        folder: the stage's checkpoint folder, already particular to parameters (the seed among them) and inputs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "rewards.jsonl"
        self._lines: list[bytes] = []
        self._checksum = 0

    def load(self) -> list[Entry]:
        """Every entry that was written whole; what comes after them is taken away, so that lines can be appended."""
        self._lines, self._checksum = [], 0
        found = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        entries: list[Entry] = []
        for line in found:
            entry = self._read(line)
            if entry is None:
                self.keep(len(entries))
                break
            entries.append(entry)
            self._add(line)
        return entries

    def append(self, entry: Entry) -> None:
        """Write one more; it outlives a kill from then on."""
        line = self._line(entry)
        artifacts.append(self._path, line)
        self._add(line)

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` entries."""
        kept, self._lines, self._checksum = self._lines[:count], [], 0
        artifacts.write_text(self._path, b"".join(kept).decode())
        for line in kept:
            self._add(line)

    def _add(self, line: bytes) -> None:
        self._lines.append(line)
        self._checksum = zlib.crc32(line, self._checksum)

    def _line(self, entry: Entry) -> bytes:
        row = asdict(entry)
        checksum = zlib.crc32(json.dumps(row).encode(), self._checksum)
        return json.dumps([checksum, row]).encode() + b"\n"

    def _read(self, line: bytes) -> Entry | None:
        try:
            _, row = json.loads(line)
            entry = Entry(tuple(row["kept"]), Samples(**row["samples"]), Outcome(**row["outcome"]))
        except (ValueError, TypeError, KeyError):
            return None
        return entry if self._line(entry) == line else None
