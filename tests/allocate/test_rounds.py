"""A search that is given a round's outcomes together finds what one finds that is given them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.env import Episode, PruningEnv
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.guided import guided
from ffprune.allocate.multi_step import MultiStepEnv
from ffprune.allocate.problem import Problem
from ffprune.allocate.search import NoStore, search
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation
from tests.allocate.test_journal import SEARCHES, Uneven
from tests.allocate.worlds import Bandit, layers

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BOUNDS = Bounds(0.1, 1.0)
SMALL = Preset((8,), (8,), 1e-2, 0.2, 8, 2, 0.3)
RISING = Schedule.scaled(0.6, 0.01, 500, episodes=24)
CURVES = [np.linspace(1, 0, unit.granules + 1) ** 2 for unit in UNITS]
EVERY: dict[str, Callable[[Problem, Callable[[Any], None]], Any]] = {
    **{name: lambda problem, told, run=run: run(problem, 0, told) for name, run in SEARCHES.items()},
    "ppo": lambda problem, told: search(problem, SMALL, RISING, 24, 3, 0, NoStore(), told),
    "guided": lambda problem, told: guided(
        problem, CURVES, Guidance(0.2, 0.4, 16, 6, 2), SMALL, RISING, 24, 3, 0, NoStore(), told
    ),
}


class Together(Uneven):
    """All of a round before the first outcome is given, the last policy first."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(weights)
        self.rounds: list[int] = []

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        self.rounds.append(len(allocations))
        found = [self(allocation, samples) for allocation in reversed(allocations)]
        return reversed(found)


def run(name: str, reward: Bandit) -> list[object]:
    told: list[Any] = []
    problem = Problem(UNITS, 0.3, BOUNDS, "water_fill", 1, reward, {"uniform": uniform(UNITS, 0.3, BOUNDS)})
    torch.manual_seed(5)
    found = EVERY[name](problem, told.append)
    return [found.best, found.candidates, [(t.number, t.allocation, t.samples, t.outcome) for t in told]]


@pytest.mark.parametrize("name", EVERY)
def test_together_or_one_by_one_is_the_same(name: str) -> None:
    together = Together(WEIGHTS)
    assert run(name, together) == run(name, Uneven(WEIGHTS))
    # And it is worth the trouble: rounds are asked for, not single policies.
    trials = [size for size in together.rounds if size]
    assert len(trials) < sum(trials) / 2


class AtOnce(PruningEnv):
    """The obvious environment: a step evaluates its policy and gives its reward."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        scores = np.asarray(action, dtype=np.float64)
        number, sparsity, draw = self.episode, self.sparsity, self._update
        samples = self.schedule.samples_at(draw * self._per_update, self.problem.reward.most_samples)
        allocation = self.problem.allocate(scores, sparsity)
        (outcome,) = self.problem.reward.many([allocation], Samples(samples, draw))
        self.episode += 1
        self._on_episode(Episode(number, sparsity, samples, draw, scores, allocation, outcome))
        return self._observe(), outcome.reward, True, False, {}


class AtOnceByUnit(MultiStepEnv):
    """The same for one step a unit."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        state, reward, done, truncated, info = super().step(action)
        if done:
            (reward,) = super().settle()
        return state, reward, done, truncated, info

    def settle(self) -> list[float]:
        return []


@pytest.mark.parametrize("by_unit", [False, True])
def test_an_agent_learns_from_rewards_at_the_updates_end_what_it_learns_at_once(by_unit: bool) -> None:
    found = []
    for at_once in (False, True):
        log: list[Episode] = []
        problem = Problem(UNITS, 0.3, BOUNDS, "water_fill", 1, Bandit(WEIGHTS))
        env: PruningEnv
        if by_unit:
            env = (AtOnceByUnit if at_once else MultiStepEnv)(problem, SMALL.episodes_per_update, log.append)
        else:
            env = (AtOnce if at_once else PruningEnv)(problem, RISING, SMALL.episodes_per_update, log.append)
        agent = Agent(env, SMALL, 0)
        for _ in range(3):
            agent.update()
        found.append((agent.weights(), [(e.number, e.samples, e.draw, e.outcome) for e in log]))
    (weights, episodes), (expected, expected_episodes) = found
    assert episodes == expected_episodes
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
