"""Episodes on the model of the loss: as in :mod:`ffprune.allocate.env`, but by formula, an update's all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Env
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from ffprune.allocate.dynamic import coin, front
from ffprune.allocate.env import action_space, observation_space
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.problem import Problem
from ffprune.allocate.surrogate import Floats, Surrogate
from ffprune.core.budget import check_reachable, reachable
from ffprune.core.policy import fill, scores_for
from ffprune.core.units import Allocation


class Imagined(VecEnv):
    """Single-step episodes side by side; the reward is how much better than dynamic programming the model takes it for.

    The sparsity is drawn anew for every episode, and scores are departures from the policy that dynamic programming
    finds on the model at that sparsity: the agent learns what the sum of curves leaves out. A policy is scored as the
    mapping leaves it, not rounded to whole granules: the curves tell what lies between two.

    Args:
        problem: what is to be allocated.
        surrogate: the model of the loss.
        guidance: the range.
        seed: of the sparsities.
        width: episodes at once.

    Attributes:
        problem: what is to be allocated.
        steps: steps of an episode.
        episode: episodes so far.
        grid: float64 ``[m]``, sparsities of the range, among them the problem's own.
        policies: at each of these, what dynamic programming finds on the model, since the last :meth:`aim`.
    """

    steps = 1

    def __init__(self, problem: Problem, surrogate: Surrogate, guidance: Guidance, seed: int, width: int) -> None:
        self.problem, self.episode = problem, 0
        self._surrogate, self._seed = surrogate, seed
        self._granules = np.array([unit.granules for unit in problem.units])
        # The range is a wish, which the bounds may narrow; the target itself must be within reach.
        check_reachable(problem.units, problem.sparsity, problem.bounds)
        least, most = reachable(problem.units, problem.bounds)
        low = max(least, min(guidance.low, problem.sparsity))
        high = min(most, max(guidance.high, problem.sparsity))
        self.grid = np.unique(np.append(np.linspace(low, high, 9), problem.sparsity))
        self.policies: list[Allocation] = []
        super().__init__(width, observation_space(), action_space(problem))
        self._sparsities = np.full(width, problem.sparsity)
        self._scores = np.zeros((width, len(problem.units)))

    @property
    def final(self) -> NDArray[np.float32]:
        """What the agent sees when the target is the problem's own."""
        return np.array([self.problem.sparsity], dtype=np.float32)

    @property
    def best(self) -> Allocation:
        """The best policy at the problem's own sparsity by the corrected curves, since the last :meth:`aim`."""
        return self.policies[int(np.searchsorted(self.grid, self.problem.sparsity))]

    def aim(self) -> None:
        """Bring the policies that scores depart from up to date with the model."""
        units, bounds = self.problem.units, self.problem.bounds
        step = coin(units, self.problem.step)
        self.policies = front(units, self._surrogate.curves, [float(s) for s in self.grid], bounds, step)
        self._base = np.stack([scores_for(np.array(p.retention), bounds) for p in self.policies])
        self._reference = self._surrogate.mean([p.kept for p in self.policies])

    def allocate(self, scores: Floats, sparsity: float) -> Allocation:
        """The policy of an action at a sparsity."""
        return self.problem.allocate(self._departed_from(sparsity) + scores, sparsity)

    def settle(self) -> list[float]:
        """Nothing: steps give their rewards."""
        return []

    def reset(self) -> VecEnvObs:
        """Draw a sparsity for every episode."""
        # By the number of the episode: a resumed search draws what it would have drawn.
        rng = np.random.default_rng([self._seed, self.episode])
        self._sparsities = rng.uniform(self.grid[0], self.grid[-1], self.num_envs)
        return self._sparsities[:, None].astype(np.float32)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Take the scores."""
        self._scores = np.asarray(actions, dtype=np.float64)

    def step_wait(self) -> VecEnvStepReturn:
        """Predict, and begin the next episodes."""
        problem, sparsities = self.problem, self._sparsities
        scores = self._departed_from(sparsities) + self._scores
        retentions = fill(scores, problem.units, sparsities, problem.bounds, problem.mapping)
        losses = self._surrogate.mean(retentions * self._granules)
        rewards = 1 - losses / np.interp(sparsities, self.grid, self._reference)
        self.episode += self.num_envs
        ended = np.ones(self.num_envs, dtype=bool)
        return self.reset(), rewards.astype(np.float32), ended, [{} for _ in range(self.num_envs)]

    def _departed_from(self, sparsity: float | Floats) -> Floats:
        """Scores of dynamic programming's policies, between those of the grid, ``[...]`` -> ``[..., N]``."""
        return np.stack([np.interp(sparsity, self.grid, column) for column in self._base.T], -1)

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The same of every episode."""
        return [getattr(self, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """No part of what PPO asks of an environment."""
        raise NotImplementedError

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """No part of what PPO asks of an environment."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type[Env[Any, Any]], indices: VecEnvIndices = None) -> list[bool]:
        """Nothing is."""
        return [False for _ in self._get_indices(indices)]
