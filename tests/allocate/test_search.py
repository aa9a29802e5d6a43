from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ffprune.allocate.agent import Preset
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate
from ffprune.allocate.search import SearchResult, search
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation
from tests.allocate.worlds import LAPS, Bandit, assert_exact, layers

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BOUNDS = Bounds(0.1, 1.0)
SMALL = Preset((32,), (32,), 1e-2, 0.2, 8, 5, 0.3)
EPISODES = 40
RISING = Schedule.scaled(0.6, 0.01, 500, episodes=EPISODES)
State = tuple[dict[str, Tensor], list[Episode], list[Candidate]]


class Memory:
    """A store; ``die_after`` saves it kills the search, after saving."""

    def __init__(self, die_after: int | None = None) -> None:
        self.kept: State | None = None
        self.saves, self.die_after = 0, die_after

    def load(self) -> State | None:
        return self.kept

    def save(self, agent: dict[str, Tensor], episodes: Sequence[Episode], starts: Sequence[Candidate]) -> None:
        self.kept = dict(agent), list(episodes), list(starts)
        self.saves += 1
        if self.saves == self.die_after:
            raise KeyboardInterrupt


def problem(bandit: Bandit, sparsity: float = 0.3, starts: dict[str, Allocation] | None = None) -> Problem:
    if starts is None:
        starts = {"uniform": uniform(UNITS, sparsity, BOUNDS)}
    return Problem(UNITS, sparsity, BOUNDS, "water_fill", 4, bandit, starts)


def ignore(_: Episode) -> None:
    pass


def run(
    store: Memory,
    bandit: Bandit | None = None,
    on_episode: Callable[[Episode], None] = ignore,
    trained: dict[str, Tensor] | None = None,
    starts: dict[str, Allocation] | None = None,
    episodes: int = EPISODES,
    sparsity: float = 0.3,
) -> SearchResult:
    task = problem(bandit or Bandit(WEIGHTS), sparsity, starts)
    return search(task, SMALL, RISING, episodes, 3, 0, store, on_episode, trained)


@functools.cache
def whole() -> SearchResult:
    """The search that no one kills: what every killed one is compared with."""
    return run(Memory())


def assert_same(a: SearchResult, b: SearchResult) -> None:
    assert a.best == b.best
    assert a.candidates == b.candidates
    assert a.start == b.start
    assert [e.outcome for e in a.episodes] == [e.outcome for e in b.episodes]
    for one, other in zip(a.episodes, b.episodes, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
    assert a.agent.keys() == b.agent.keys()
    assert all(torch.equal(a.agent[name], b.agent[name]) for name in a.agent)


def forget() -> None:
    """The random generators of another process."""
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002 - SB3 uses it


def test_the_same_search_twice_is_the_same_search() -> None:
    first = whole()
    forget()
    assert_same(first, run(Memory()))


@pytest.mark.parametrize("saves", [1, 2, 4, 6])
def test_killed_after_a_save_it_ends_as_if_never_killed(saves: int) -> None:
    expected, store = whole(), Memory(die_after=saves)
    with pytest.raises(KeyboardInterrupt):
        run(store)
    forget()
    assert_same(run(store), expected)


@pytest.mark.parametrize("episode", [0, 3, 8, 13, 39])
def test_killed_inside_an_update_it_ends_as_if_never_killed(episode: int) -> None:
    def dies(e: Episode) -> None:
        if e.number == episode:
            raise KeyboardInterrupt

    expected, store = whole(), Memory()
    with pytest.raises(KeyboardInterrupt):
        run(store, on_episode=dies)
    forget()
    told: list[int] = []
    assert_same(run(store, on_episode=lambda e: told.append(e.number)), expected)
    assert told == list(range(EPISODES))


def test_a_resumed_search_pays_for_the_starts_once() -> None:
    store, bandit = Memory(die_after=2), Bandit(WEIGHTS)
    with pytest.raises(KeyboardInterrupt):
        run(store)
    run(store, bandit)
    assert None not in bandit.draws[: EPISODES - SMALL.episodes_per_update]


def test_a_finished_search_resumed_repeats_nothing_but_the_comparison() -> None:
    store = Memory()
    first, bandit = run(store), Bandit(WEIGHTS)
    assert_same(run(store, bandit), first)
    assert set(bandit.draws) == {None}


def test_episodes_are_rounded_up_to_whole_updates() -> None:
    assert len(run(Memory(), episodes=11).episodes) == 16


def test_the_best_is_the_winner_of_the_race_and_starts_take_part() -> None:
    bandit = Bandit(WEIGHTS)
    starts = {"uniform": uniform(UNITS, 0.3, BOUNDS), "worse": uniform(UNITS, 0.35, BOUNDS)}
    found = run(Memory(), bandit, starts=starts)
    names = [candidate.name for candidate in found.candidates]
    assert {"uniform", "worse", "agent"} <= set(names)
    assert found.start == "uniform"
    assert found.best == found.candidates[0]
    whole = [candidate for candidate in found.candidates if candidate.outcome.tokens == bandit.fixed]
    assert found.candidates[: len(whole)] == sorted(whole, key=lambda candidate: candidate.outcome.loss)
    # Really scored once more: on the fixed samples, at the final sparsity.
    assert found.best.outcome.tokens == bandit.fixed
    for candidate in found.candidates:
        read = [s.count for a, s in bandit.calls if s.draw is None and a == candidate.allocation]
        assert sum(read) == candidate.outcome.tokens
        assert candidate.outcome.perplexity == pytest.approx(10 * np.exp(bandit.loss(candidate.allocation)))
        if candidate.name != "worse":
            assert_exact(candidate.allocation, 0.3)
    assert len({candidate.allocation.kept for candidate in found.candidates}) == len(found.candidates)


def test_it_finds_more_than_it_was_given() -> None:
    bandit = Bandit(WEIGHTS)
    found = run(Memory(), bandit, episodes=160)
    assert bandit.loss(found.best.allocation) < 0.8 * bandit.loss(uniform(UNITS, 0.3, BOUNDS))


def test_the_best_start_is_returned_when_no_trial_beats_it() -> None:
    curves = [w * np.linspace(1, 0, u.granules + 1) ** 2 for w, u in zip(WEIGHTS, UNITS, strict=True)]
    best = dynamic_programming(UNITS, curves, 0.3, BOUNDS, 1)
    found = run(Memory(), starts={"uniform": uniform(UNITS, 0.3, BOUNDS), "answer": best}, episodes=8)
    assert (found.best.name, found.best.allocation, found.start) == ("answer", best, "answer")


def test_without_starts_it_begins_from_nothing() -> None:
    found = run(Memory(), starts={}, episodes=8)
    assert found.start is None
    assert all(c.name == "agent" or c.name.startswith("episode ") for c in found.candidates)
    assert 1 <= len(found.candidates) <= 4


def test_the_trials_with_the_greatest_lead_over_their_update_are_finalists() -> None:
    found = run(Memory(), Bandit(WEIGHTS, noise=0.5))
    rewards = np.array([e.outcome.reward for e in found.episodes]).reshape(-1, SMALL.episodes_per_update)
    lead = (rewards / rewards.mean(1, keepdims=True)).flatten()
    best = {f"episode {i}" for i in np.argsort(-lead)[:3]}
    assert {c.name for c in found.candidates if c.name.startswith("episode")} == best


def test_transfer_continues_the_trained_agent() -> None:
    first = whole()
    store = Memory(die_after=1)
    with pytest.raises(KeyboardInterrupt):
        run(store, trained=first.agent, sparsity=0.4)
    assert store.kept is not None
    for name, tensor in first.agent.items():
        assert torch.equal(store.kept[0][name], tensor), name
    forget()
    resumed = run(store, trained=first.agent, sparsity=0.4)
    unkilled = run(Memory(), trained=first.agent, sparsity=0.4)
    assert_same(resumed, unkilled)
    assert unkilled.start is None
    assert_exact(unkilled.best.allocation, 0.4)


def test_broken_trials_are_counted_and_a_finite_policy_is_returned() -> None:
    # Behind the start every third trial breaks, and all of one update.
    broken = [LAPS + i for i in (*range(0, 40, 3), *range(16, 24))]
    found = run(Memory(), Bandit(WEIGHTS, broken=broken))
    assert sum(not e.outcome.finite for e in found.episodes) == len(set(broken))
    assert found.best.outcome.finite


def test_a_search_in_which_nothing_is_finite_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match=r"40 trials"):
        run(Memory(), Bandit(WEIGHTS, broken=range(1000)))
