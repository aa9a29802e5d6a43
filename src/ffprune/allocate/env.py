"""The single-step environment (FF section 2.1, SS section 3.1; METHODS 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ffprune.allocate.problem import Problem
from ffprune.core.budget import reachable
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation

SCORE_LIMIT = 10.0
"""tanh is flat to the last float32 bit beyond this, so a wider action space would add nothing."""


@dataclass(frozen=True)
class Episode:
    """One trial: a policy, and what it gave.

    Attributes:
        number: 0-based position in the search.
        sparsity: the target of this episode (FF Eq. 4).
        samples: fidelity of this episode (FF Eq. 5).
        draw: which draw of samples it read; episodes of the same draw read the same text.
        scores: float64 ``[N]``, the action A_t.
        allocation: the policy after mapping.
        outcome: what its evaluation gave.
    """

    number: int
    sparsity: float
    samples: int
    draw: int
    scores: NDArray[np.float64]
    allocation: Allocation
    outcome: Outcome


def observation_space() -> gymnasium.Space[NDArray[np.float32]]:
    """Of a target sparsity."""
    return gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)


def action_space(problem: Problem) -> gymnasium.Space[NDArray[np.float32]]:
    """Of one unbounded score per unit."""
    return gymnasium.spaces.Box(-SCORE_LIMIT, SCORE_LIMIT, (len(problem.units),), np.float32)


class PolicyEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """State: a target sparsity; action: one unbounded score per unit.

    Args:
        problem: what is to be allocated.

    Attributes:
        problem: what is to be allocated.
        steps: steps of an episode.
        episode: episodes so far.
    """

    steps = 1

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.episode = 0
        self.observation_space = observation_space()
        self.action_space = action_space(problem)

    @property
    def final(self) -> NDArray[np.float32]:
        """What the agent sees first when the target is the problem's own."""
        return np.array([self.problem.sparsity], dtype=np.float32)

    def settle(self) -> list[float]:
        """Rewards of the episodes since the last call, where steps do not give them; none where they do."""
        return []


class PruningEnv(PolicyEnv):
    """One step per episode: state = target sparsity, action = one unbounded score per unit.

    Steps give no reward. Neither states nor actions of an update depend on its rewards, so that all its policies are
    known before the first is evaluated: :meth:`settle` asks for them together, and the trials may run side by side.

    The sparsity and fidelity curricula (FF Eq. 3-5) change between updates, never within one, so that the
    policies of an update are compared at the same task on the same samples.

    Args:
        problem: what is to be allocated.
        schedule: alpha(t) in episodes.
        episodes_per_update: episodes that share one task and one draw of samples.
        on_episode: told of every episode as it ends.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        episodes_per_update: int,
        on_episode: Callable[[Episode], None],
    ) -> None:
        super().__init__(problem)
        self.schedule = schedule
        self._per_update, self._on_episode = episodes_per_update, on_episode
        self._lowest = reachable(problem.units, problem.bounds)[0]
        self._open: list[tuple[int, float, NDArray[np.float64], Allocation]] = []

    @property
    def _update(self) -> int:
        return self.episode // self._per_update

    @property
    def sparsity(self) -> float:
        """sigma_t of the current update (FF Eq. 4), but never below what a_max < 1 removes in any case."""
        aimed = self.schedule.sparsity_at(self._update * self._per_update, self.problem.sparsity)
        return max(aimed, self._lowest)

    def _observe(self) -> NDArray[np.float32]:
        return np.array([self.sparsity], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode; the state is the target sparsity alone."""
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Map the scores to a policy; the episode ends."""
        scores = np.asarray(action, dtype=np.float64)
        self._finish(scores, self.problem.allocate(scores, self.sparsity))
        return self._observe(), 0.0, True, False, {}

    def settle(self) -> list[float]:
        """Evaluate the policies of an update, which has ended, on its samples (FF Eq. 5); tell of every episode."""
        ended, self._open = self._open, []
        draw = (self.episode - len(ended)) // self._per_update
        samples = self.schedule.samples_at(draw * self._per_update, self.problem.reward.most_samples)
        outcomes = self.problem.reward.many([allocation for *_, allocation in ended], Samples(samples, draw))
        rewards = []
        for (number, sparsity, scores, allocation), outcome in zip(ended, outcomes, strict=True):
            self._on_episode(Episode(number, sparsity, samples, draw, scores, allocation, outcome))
            rewards.append(outcome.reward)
        return rewards

    def _finish(self, scores: NDArray[np.float64], allocation: Allocation) -> None:
        """End an episode; its policy waits for the others of the update."""
        self._open.append((self.episode, self.sparsity, scores, allocation))
        self.episode += 1
