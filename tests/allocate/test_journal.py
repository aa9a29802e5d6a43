"""Searches that are killed and go on by being given their rewards again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ffprune.allocate.agent import Preset
from ffprune.allocate.env import Episode
from ffprune.allocate.evolution import Evolution, eas
from ffprune.allocate.evopress import EvoPress, evopress
from ffprune.allocate.journal import Entry, NoJournal, Replayed
from ffprune.allocate.multi_step import amc
from ffprune.allocate.problem import Problem, Reward
from ffprune.allocate.search import SearchResult
from ffprune.allocate.trials import Evolved, Trial
from ffprune.core.budget import Bounds
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation
from tests.allocate.test_multi_step import forget
from tests.allocate.worlds import LAPS, Bandit, layers

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BAD = 7  # every policy whose first FFN keeps a multiple of it is broken
TRIALS = 27

Told = Callable[[Any], None]
SEARCHES: dict[str, Callable[[Problem, int, Told], Evolved | SearchResult]] = {
    "eas": lambda problem, seed, told: eas(problem, Evolution(8, 3, 4, 4), TRIALS, seed, told),
    "evopress": lambda problem, seed, told: evopress(problem, EvoPress(6, (2, 1), (0.5, 1.0)), TRIALS, seed, told),
    "amc": lambda problem, seed, told: amc(problem, Preset((8,), (8,), 1e-2, 0.2, 8, 2, 0.3), TRIALS, 2, seed, told),
}


class Uneven(Bandit):
    """A bandit in which some policies have no finite loss, whenever they are asked for."""

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        outcome = super().__call__(allocation, samples)
        if allocation.kept[1] % BAD == 0:
            return replace(outcome, reward=0.0, loss=float("inf"), perplexity=float("inf"), finite=False)
        return outcome


class Memory:
    """A journal that outlives the search."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def load(self) -> list[Entry]:
        return list(self.entries)

    def append(self, entry: Entry) -> None:
        self.entries.append(entry)

    def keep(self, count: int) -> None:
        del self.entries[count:]


class Killed(Exception):
    pass


def run(name: str, reward: Reward, seed: int = 0, die_at: int | None = None) -> tuple[Any, list[Trial | Episode]]:
    """What a search finds, and the trials that it told of."""
    told: list[Trial | Episode] = []

    def tell(trial: Trial | Episode) -> None:
        told.append(trial)
        if len(told) == die_at:
            raise Killed

    problem = Problem(UNITS, 0.3, Bounds(0.1, 1.0), "water_fill", 1, reward)
    return SEARCHES[name](problem, seed, tell), told


def shown(found: Evolved | SearchResult, told: Sequence[Trial | Episode]) -> list[object]:
    return [found.best, found.candidates, [(t.number, t.allocation, t.samples, t.outcome) for t in told]]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("trials", [1, 8, 20, TRIALS])
def test_a_killed_search_goes_on_to_the_same_result_and_asks_only_what_is_left(name: str, trials: int) -> None:
    whole, journal = Uneven(WEIGHTS), Memory()
    expected = shown(*run(name, Replayed(whole, NoJournal())))
    killed, resumed = Uneven(WEIGHTS), Uneven(WEIGHTS)
    with pytest.raises(Killed):
        run(name, Replayed(killed, journal), die_at=trials)
    forget()
    assert shown(*run(name, Replayed(resumed, journal))) == expected
    assert killed.calls + resumed.calls == whole.calls
    # Once more, to the end: nothing is asked.
    assert shown(*run(name, Replayed(Bandit(()), journal))) == expected


@pytest.mark.parametrize("name", SEARCHES)
def test_another_seed_is_not_given_the_answers_of_this_one(name: str) -> None:
    journal, alone, after = Memory(), Uneven(WEIGHTS), Uneven(WEIGHTS)
    run(name, Replayed(Uneven(WEIGHTS), journal), seed=1)
    expected = shown(*run(name, alone))
    assert shown(*run(name, Replayed(after, journal))) == expected
    same = len(alone.calls) - len(after.calls)
    assert same <= LAPS + 1  # the start, and the first trial, which is the start again
    # What was forgotten is replaced: the journal is this search's now.
    asked = [(allocation.kept, samples) for allocation, samples in alone.calls]
    assert [(entry.kept, entry.samples) for entry in journal.entries] == asked


def test_an_answer_is_only_for_the_same_policy_and_samples() -> None:
    dense, cut = Allocation.dense(UNITS), Allocation(UNITS, tuple(max(1, u.granules // 2) for u in UNITS))
    others = (Samples(4, 0), Samples(3, 1), Samples(3, None), Samples(3, 0, 1))
    for asked in ((cut, Samples(3, 0)), *((dense, samples) for samples in others)):
        journal, bandit = Memory(), Bandit(WEIGHTS)
        first = Replayed(Bandit(WEIGHTS), journal)
        for draw in (5, 0, 6):
            list(first.many([dense], Samples(3, draw)))
        again = Replayed(bandit, journal)
        list(again.many([dense], Samples(3, 5)))
        list(again.many([asked[0]], asked[1]))
        list(again.many([dense], Samples(3, 6)))
        assert bandit.calls == [asked, (dense, Samples(3, 6))]
        assert len(journal.entries) == 3
    assert (again.most_samples, again.fixed) == (bandit.most_samples, bandit.fixed)


def test_an_answer_is_written_down_before_the_next_question() -> None:
    journal = Memory()

    class Dies(Bandit):
        def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
            if len(self.calls) == 3:
                raise Killed
            return super().__call__(allocation, samples)

    reward = Dies(WEIGHTS)
    with pytest.raises(Killed):
        run("eas", Replayed(reward, journal))
    assert len(journal.entries) == len(reward.calls) == 3
