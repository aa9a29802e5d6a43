"""Rewards of a running search, written line by line and read back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ffprune.allocate.evolution import Evolution, eas
from ffprune.allocate.journal import Entry, Replayed
from ffprune.allocate.problem import Problem
from ffprune.allocate.trials import Evolved
from ffprune.core.budget import Bounds
from ffprune.core.errors import DiskFull
from ffprune.core.outcome import Outcome, Samples
from ffprune.stages import artifacts
from ffprune.stages.search_journal import SearchJournal
from tests.allocate.worlds import Bandit, layers

ENTRIES = [
    Entry((2, 30, 3, 12), Samples(4, None, 8), Outcome(0.1 + 0.2, 1 / 3, 12.345678901234567, 2e-17, True, 44)),
    Entry((1, 2, 3, 4), Samples(3, 0), Outcome(0.0, math.inf, math.inf, 10.0, False, 44)),
    Entry((1, 2, 3, 5), Samples(3, 1), Outcome(5e-324, -0.0, 1.7976931348623157e308, 10.0, True, 45)),
]


def written(folder: Path, entries: list[Entry] = ENTRIES) -> Path:
    journal = SearchJournal(folder)
    assert journal.load() == []
    for entry in entries:
        journal.append(entry)
    (file,) = folder.iterdir()
    return file


def test_all_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    written(tmp_path)
    found = SearchJournal(tmp_path).load()
    assert found == ENTRIES
    assert repr(found) == repr(ENTRIES)  # -0.0, and whole numbers that are whole


def test_every_line_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(handle))
    file = written(tmp_path, ENTRIES[:2])
    assert len(synced) == 2
    assert file.read_bytes().count(b"\n") == 2


def test_a_line_that_a_kill_cut_short_is_ignored_and_written_over(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        file.write_bytes(whole[:-cut])
        journal = SearchJournal(tmp_path)
        assert journal.load() == ENTRIES[:2], cut
        journal.append(ENTRIES[2])
        assert file.read_bytes() == whole, cut


@pytest.mark.parametrize("line", [0, 1, 2])
def test_what_follows_a_damaged_or_missing_line_is_not_taken_for_an_answer(tmp_path: Path, line: int) -> None:
    file = written(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (
        b"",
        b"\xff\xfe\n",
        b"[]\n",
        b"[1, 2]\n",
        b"null\n",
        lines[line].replace(b'"tokens": 4', b'"tokens": 5'),
        lines[line].replace(b"kept", b"kpet"),
        lines[line] * 2,
    ):
        file.write_bytes(b"".join([*lines[:line], damaged, *lines[line + 1 :]]))
        # A line written twice is good once.
        expected = ENTRIES[: line + 1] if damaged == lines[line] * 2 else ENTRIES[:line]
        assert SearchJournal(tmp_path).load() == expected, damaged
        assert SearchJournal(tmp_path).load() == expected, damaged


def test_entries_are_forgotten_from_the_end(tmp_path: Path) -> None:
    written(tmp_path)
    journal = SearchJournal(tmp_path)
    journal.load()
    journal.keep(1)
    assert SearchJournal(tmp_path).load() == ENTRIES[:1]
    journal.append(ENTRIES[2])
    assert SearchJournal(tmp_path).load() == [ENTRIES[0], ENTRIES[2]]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_refused_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, ENTRIES[:2])
    journal = SearchJournal(tmp_path)
    journal.load()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DiskFull):
            journal.append(ENTRIES[2])
    assert SearchJournal(tmp_path).load()[:2] == ENTRIES[:2]


def test_a_search_goes_on_from_the_file(tmp_path: Path) -> None:
    units = layers(2)

    def run(folder: Path, bandit: Bandit, die_at: int | None = None) -> Evolved:
        def told(trial: object) -> None:
            if len(bandit.calls) == die_at:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        reward = Replayed(bandit, SearchJournal(folder))
        problem = Problem(units, 0.3, Bounds(0.1, 1.0), "water_fill", 1, reward)
        return eas(problem, Evolution(6, 2, 3, 3), 20, 0, told)

    whole, killed, resumed = (Bandit((1.0, 2.0, 3.0, 4.0)) for _ in range(3))
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed, die_at=9)
    (file,) = (tmp_path / "killed").iterdir()
    artifacts.append(file, b'[17, {"kept": [1')  # killed once more, while it wrote
    assert run(tmp_path / "killed", resumed) == expected
    assert killed.calls + resumed.calls == whole.calls
