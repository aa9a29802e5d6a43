"""The race of candidates, in a world where a policy's loss is known on every part of the fixed samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffprune.allocate.problem import Problem, Standing, distinct
from ffprune.allocate.race import Candidate, compare, race
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss
from ffprune.core.outcome import Outcome, Samples, pooled
from ffprune.core.units import Allocation
from tests.allocate.worlds import Bandit, layers

UNITS = layers(1, channels=100)
POLICIES = [Allocation(UNITS, (1, 1 + i)) for i in range(12)]


class Told(Bandit):
    """Losses of a policy on each of the fixed samples, as they are told."""

    def __init__(self, losses: dict[Allocation, Sequence[float]]) -> None:
        super().__init__(())
        self.losses = losses
        self.fixed = len(next(iter(losses.values())))

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        self.calls.append((allocation, samples))
        there = self.losses[allocation][samples.first : samples.first + samples.count]
        assert len(there) == samples.count > 0
        assert samples.draw is None
        loss = math.fsum(there) / len(there)
        if not math.isfinite(loss):
            return Outcome(0.0, math.inf, math.inf, 10.0, False, samples.count)
        return Outcome(math.exp(-loss), loss, 10 * math.exp(loss), 10.0, True, samples.count)

    @property
    def read(self) -> Counter[Allocation]:
        """Samples read by policy."""
        found: Counter[Allocation] = Counter()
        for allocation, samples in self.calls:
            found[allocation] += samples.count
        return found


def problem(reward: Told, seen: list[Standing] | None = None) -> Problem:
    told = [] if seen is None else seen
    return Problem(UNITS, 0.3, Bounds(0.1, 1.0), "water_fill", 1, reward, on_race=told.append)


def named(count: int) -> list[tuple[str, Allocation]]:
    return [(str(i), POLICIES[i]) for i in range(count)]


@given(
    st.integers(1, 20).flatmap(
        lambda fixed: st.lists(st.lists(st.floats(0.1, 2), min_size=fixed, max_size=fixed), min_size=1, max_size=12)
    )
)
def test_it_is_halving_on_growing_text(table: list[list[float]]) -> None:
    """Against the definition: sort by the mean up to here, keep the better half; two at least after a quarter."""
    told = Told(dict(zip(POLICIES, table, strict=False)))
    found = race(problem(told), named(len(table)))
    fixed = told.fixed
    left, gone = list(range(len(table))), list[int]()
    for end in sorted({math.ceil(fixed / 4), math.ceil(fixed / 2), fixed}):
        left.sort(key=lambda i: round(math.fsum(table[i][:end]) / end, 9))
        if end < fixed:
            keep = max(1 if end >= fixed / 2 else 2, (len(left) + 1) // 2)
            left, gone = left[:keep], left[keep:] + gone
    assert {c.allocation for c in found[: len(left)]} == {POLICIES[i] for i in left}
    assert sum(told.read.values()) == sum(candidate.outcome.tokens for candidate in found)
    assert found[0].outcome.tokens == fixed
    assert found[0].outcome.loss == pytest.approx(min(math.fsum(table[i]) / fixed for i in left))
    assert len(found) == len(table)


def test_losers_cost_a_quarter() -> None:
    told = Told({policy: [0.1 * (1 + i)] * 16 for i, policy in enumerate(POLICIES[:6])})
    found = race(problem(told), named(6))
    assert [candidate.name for candidate in found] == list("012345")
    assert [told.read[policy] for policy in POLICIES[:6]] == [16, 16, 8, 4, 4, 4]


def test_what_is_known_is_not_asked_again_and_still_compared_on_the_same_text() -> None:
    # The first is ahead at the start and behind in the end.
    losses = {POLICIES[0]: [0.1] * 4 + [0.9] * 12, POLICIES[1]: [0.6] * 16, POLICIES[2]: [0.3] * 16}
    told = Told(losses)
    known = race(problem(told), named(2))
    assert {c.name: c.outcome.tokens for c in known} == {"1": 8, "0": 16}
    before = Counter(told.read)
    found = race(problem(told), named(3), known)
    assert [candidate.name for candidate in found] == ["2", "0", "1"]
    assert told.read - before == {POLICIES[2]: 16}
    assert {c.name: c.outcome.tokens for c in found} == {"0": 16, "1": 8, "2": 16}


def test_one_left_behind_earlier_may_come_back() -> None:
    told = Told({policy: [loss] * 16 for policy, loss in zip(POLICIES, (0.1, 0.2, 0.3, 0.4, 0.9), strict=False)})
    known = race(problem(told), named(4))
    assert [len(candidate.laps) for candidate in known] == [3, 2, 1, 1]
    found = race(problem(told), [("4", POLICIES[4])], known)
    assert [len(candidate.laps) for candidate in found] == [3, 3, 2, 1, 1]
    assert [candidate.name for candidate in found] == list("01234")


def test_a_known_one_that_read_all_wins_though_it_begins_badly() -> None:
    told = Told({POLICIES[0]: [0.9] * 4 + [0.1] * 12, **{policy: [0.5] * 16 for policy in POLICIES[1:4]}})
    known = race(problem(told), named(1))
    found = race(problem(told), named(4), known)
    assert (found[0].name, found[0].outcome.loss) == ("0", pytest.approx(0.3))


def test_copies_of_a_policy_run_once_under_the_first_name() -> None:
    pair = [("a", POLICIES[0]), ("b", POLICIES[1]), ("c", POLICIES[0])]
    assert [name for name, _ in distinct(pair)] == ["a", "b"]
    told = Told({POLICIES[0]: [0.5] * 8, POLICIES[1]: [0.4] * 8})
    assert [candidate.name for candidate in race(problem(told), pair)] == ["b", "a"]
    assert told.read == {POLICIES[0]: 4, POLICIES[1]: 8}


def test_what_is_not_finite_comes_last_and_alone_is_refused() -> None:
    told = Told({POLICIES[0]: [math.inf] * 8, POLICIES[1]: [0.4] * 8})
    assert [candidate.name for candidate in compare(problem(told), named(2), (), 3)] == ["1", "0"]
    with pytest.raises(NonFiniteLoss, match="none of 1 candidates of 3 trials"):
        compare(problem(told), named(1), (), 3)
    assert race(problem(told), []) == []


def test_when_all_that_went_on_overflow_one_left_behind_wins() -> None:
    overflow = [0.1] * 8 + [math.inf] * 8
    told = Told({**dict.fromkeys(POLICIES[:3], overflow), POLICIES[3]: [0.5] * 16, POLICIES[4]: [0.6] * 16})
    found = compare(problem(told), named(5), (), 3)
    assert (found[0].name, found[0].outcome.tokens) == ("3", 16)
    assert sorted(candidate.name for candidate in found) == list("01234")
    assert max(told.read.values()) == 16


def test_the_outcome_is_that_of_all_laps() -> None:
    laps = (Outcome(0.5, 0.7, 20.0, 10.0, True, 100), Outcome(0.25, 1.4, 80.0, 20.0, True, 300))
    found = Candidate("a", POLICIES[0], laps).outcome
    assert found == pooled(laps)
    assert found.tokens == 400
    assert found.loss == pytest.approx(0.25 * 0.7 + 0.75 * 1.4)
    assert math.log(found.perplexity) == pytest.approx(0.25 * math.log(20) + 0.75 * math.log(80))
    assert found.dense_perplexity == pytest.approx(10**0.25 * 20**0.75)
    assert pooled(laps[:1]) == laps[0]
    broken = pooled([laps[0], Outcome(0.0, math.inf, math.inf, 10.0, False, 100)])
    assert (broken.reward, broken.loss, broken.perplexity, broken.finite) == (0.0, math.inf, math.inf, False)


@given(
    st.integers(1, 20).flatmap(
        lambda fixed: st.lists(st.lists(st.floats(0.1, 2), min_size=fixed, max_size=fixed), min_size=1, max_size=12)
    ),
    st.integers(0, 12),
)
def test_who_watches_sees_all_that_is_read_and_who_is_ahead(table: list[list[float]], known: int) -> None:
    told = Told(dict(zip(POLICIES, table, strict=False)))
    before = race(problem(told), named(min(known, len(table))))
    earlier = sum(told.read.values())
    seen: list[Standing] = []
    found = race(problem(told, seen), named(len(table)), before)
    read = sum(told.read.values()) - earlier
    assert [standing.read for standing in seen] == sorted(standing.read for standing in seen)
    # An upper bound, which only falls.
    assert [standing.most for standing in seen] == sorted((standing.most for standing in seen), reverse=True)
    assert (seen[-1].read, seen[-1].most) == (read, read) if seen else read == 0
    assert [standing.starts for standing in seen] == [number == 0 for number in range(len(seen))]
    if not known and seen:
        assert seen[0].most == read
        assert seen[-1].best in {candidate.name for candidate in found if len(candidate.laps) == len(found[0].laps)}
        assert (seen[-1].best, seen[-1].perplexity) == (found[0].name, found[0].outcome.perplexity)


def test_who_watches_is_told_as_it_goes() -> None:
    told = Told({policy: [0.1 * (2 - i)] * 8 for i, policy in enumerate(POLICIES[:2])})
    seen: list[Standing] = []
    race(problem(told, seen), named(2))
    assert [(s.read, s.most, s.best) for s in seen] == [
        (0, 12, ""),
        (2, 12, "0"),
        (4, 12, "1"),
        (4, 12, ""),
        (6, 12, "1"),
        (8, 12, "1"),
        (8, 12, ""),
        (12, 12, "1"),
    ]
