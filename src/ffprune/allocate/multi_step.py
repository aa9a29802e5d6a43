"""AMC's search: the agent visits one unit after the other and is rewarded at the end (He et al., ECCV 2018).

SS section 4.6 compares its single step with this (SS Fig. 6). Environment, bounded actions and the credit of every
step with the final reward are AMC's; the agent is the same PPO as for the single step, where AMC had DDPG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.env import SCORE_LIMIT, Episode, PruningEnv
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import compare
from ffprune.allocate.search import SearchResult, most_promising
from ffprune.allocate.trials import on_budget
from ffprune.core.budget import check_reachable, least_count, limits
from ffprune.core.policy import scores_for
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation, removed, total_cost

_NO_CURRICULUM = Schedule(1.0, 1.0, 0.0)


class MultiStepEnv(PruningEnv):
    """One step per unit: state = that unit and what went before, action = one unbounded score.

    The state, float32 ``[7]`` in [0, 1], is AMC's: index of the unit, its kind, layer and size (each from the least
    to the greatest), share of all cost removed so far, share still to come after this unit, retention of the
    unit before (1 at first). The kind is the last part of the unit's name, so that q and down differ. The score
    becomes a retention as in the single step, (tanh + 1) / 2 between the bounds, and then whole granules within
    what the other units leave possible (AMC Alg. 1). The reward is the last unit's, and comes with the update's end.

    Args:
        problem: what is to be allocated; its mapping is not used, its target is that of every episode.
        episodes_per_update: episodes that share one draw of samples.
        on_episode: told of every episode as it ends.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has the target sparsity.
    """

    def __init__(self, problem: Problem, episodes_per_update: int, on_episode: Callable[[Episode], None]) -> None:
        super().__init__(problem, _NO_CURRICULUM, episodes_per_update, on_episode)
        check_reachable(problem.units, problem.sparsity, problem.bounds)
        units = problem.units
        self.steps = len(units)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (7,), np.float32)
        self.action_space = gymnasium.spaces.Box(-SCORE_LIMIT, SCORE_LIMIT, (1,), np.float32)
        self._low, self._high = limits(units, problem.bounds)
        self._whole = total_cost(units)
        self._target = least_count(problem.sparsity, self._whole)
        # Up to this much more is still exact (METHODS 1).
        self._slack = min(unit.granule_cost for unit in units) - 1
        kinds = list(dict.fromkeys(unit.name.rpartition(".")[2] for unit in units))
        rows = [(i, kinds.index(u.name.rpartition(".")[2]), u.layer, u.params) for i, u in enumerate(units)]
        self._fixed = _from_least_to_greatest(np.array(rows, dtype=np.float64))
        self._kept: list[int] = []
        self._scores: list[float] = []

    @property
    def final(self) -> NDArray[np.float32]:
        """The first unit's state."""
        return self._state([])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode at the first unit."""
        super().reset(seed=seed)
        self._kept, self._scores = [], []
        return self._state([]), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Decide about one unit; after the last, the episode ends."""
        self._scores.append(float(action[0]))
        self._kept.append(self.bounded(self._kept, self._scores[-1]))
        if len(self._kept) < self.steps:
            return self._state(self._kept), 0.0, False, False, {}
        self._finish(np.array(self._scores), self._exact(self._kept))
        # As in AMC's code, the last state once more.
        return self._state(self._kept[:-1]), 0.0, True, False, {}

    def play(self, act: Callable[[NDArray[np.float32]], NDArray[np.float64]]) -> Allocation:
        """The policy that an agent's mean actions come to; nothing is evaluated."""
        kept: list[int] = []
        while len(kept) < self.steps:
            kept.append(self.bounded(kept, float(act(self._state(kept))[0])))
        return self._exact(kept)

    def bounded(self, kept: Sequence[int], score: float) -> int:
        """Granules that the next unit keeps: what its score wants, as far as the budget can still be met (AMC Alg. 1).

        AMC bounds retentions from above only, and so may end below its budget; here later units must also be able
        to use up what is left. Where no whole number of large granules meets both bounds, the upper one holds.

        Args:
            kept: granules of the units before.
            score: the agent's action.
        """
        i = len(kept)
        units, bounds = self.problem.units, self.problem.bounds
        missing = self._target - removed(units[:i], kept)
        dense = units[i].dense_cost
        # Granules that this unit may keep when later units give all they can, and must when they give nothing.
        most = units[i].affordable(dense - missing + removed(units[i + 1 :], self._low[i + 1 :]))
        freed = missing + self._slack - removed(units[i + 1 :], self._high[i + 1 :])
        fewest = units[i].affordable(dense - freed - 1) + 1
        wanted = round(((math.tanh(score) + 1) / 2 * (bounds.high - bounds.low) + bounds.low) * units[i].granules)
        possible = min(max(wanted, fewest), most)
        return min(max(possible, self._low[i]), self._high[i])

    def _state(self, kept: Sequence[int]) -> NDArray[np.float32]:
        i = len(kept)
        units = self.problem.units
        gone = removed(units[:i], kept) / self._whole
        rest = total_cost(units[i + 1 :]) / self._whole
        last = kept[-1] / units[i - 1].granules if kept else 1.0
        return np.array([*self._fixed[i], gone, rest, last], dtype=np.float32)

    def _exact(self, kept: Sequence[int]) -> Allocation:
        """On the exact budget and on the grid of the problem's step."""
        return on_budget(
            self.problem, np.array([k / u.granules for k, u in zip(kept, self.problem.units, strict=True)])
        )


def amc(
    problem: Problem,
    preset: Preset,
    trials: int,
    finalists: int,
    seed: int,
    on_trial: Callable[[Episode], None],
) -> SearchResult:
    """Search the best policy at ``problem.sparsity`` with AMC's environment.

    It begins, as the single-step search does when nothing is known, from an even share; ``problem.starts`` are not
    used. Trials have full fidelity, and the finalists are compared on the fixed samples.

    Args:
        problem: units, target, bounds and reward.
        preset: the agent's hyper-parameters; an update has as many episodes as in the single step, of N steps each.
        trials: episodes; rounded up to whole updates.
        finalists: how many trials are compared besides the agent's mean policy.
        seed: of the agent.
        on_trial: told of every trial.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has the target sparsity.
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    log: list[Episode] = []

    def record(episode: Episode) -> None:
        log.append(episode)
        on_trial(episode)

    env = MultiStepEnv(problem, preset.episodes_per_update, record)
    agent = Agent(env, preset, seed, scores_for(np.array([1 - problem.sparsity]), problem.bounds))
    while env.episode < trials:
        agent.update()
    found = [("agent", env.play(agent.act))]
    found += [(f"episode {e.number}", e.allocation) for e in most_promising(log, finalists)]
    candidates = compare(problem, found, (), len(log))
    return SearchResult(candidates[0], candidates, None, log, agent.weights())


def _from_least_to_greatest(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every column from 0 to 1; a constant one is 0."""
    low, high = columns.min(0), columns.max(0)
    scaled: NDArray[np.float64] = (columns - low) / np.where(high > low, high - low, 1)
    return scaled
