"""EvoPress: level switches at constant budget, survivors read more text (Sieberling et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffprune.allocate.problem import Problem
from ffprune.allocate.trials import Evolved, Laboratory, Trial, best_first, conclude, on_budget, scored_starts
from ffprune.core.budget import limits
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.units import Allocation, total_cost

_ATTEMPTS = 20
"""Pairs drawn for one that can switch, and offspring bred for one that is new."""


@dataclass(frozen=True)
class EvoPress:
    """Settings; the defaults are those of the published code for unstructured pruning.

    Attributes:
        offspring: mutations of the parent a generation (lambda).
        survivors: how many are left after each selection round; the last number is 1.
        fidelities: samples of each round, as a share of full fidelity.
        level: cost of a level, as a share of min(s, 1 - s) times the mean size of a unit.

    Raises:
        ParameterError: rounds that do not thin the offspring out to one, or shares that are none.
    """

    offspring: int = 64
    survivors: tuple[int, ...] = (8, 2, 1)
    fidelities: tuple[float, ...] = (1 / 32, 1 / 4, 1.0)
    level: float = 1 / 16

    def __post_init__(self) -> None:
        falling = list(self.survivors) == sorted(set(self.survivors), reverse=True)
        thinning = falling and self.survivors[-1:] == (1,) and self.offspring >= self.survivors[0]
        if not thinning or len(self.fidelities) != len(self.survivors):
            raise ParameterError(
                f"{self.offspring} offspring, survivors {self.survivors}, fidelities {self.fidelities} were asked for",
                "Survivors, at most the offspring, become fewer every round and end at 1; a round has one fidelity",
                "Change the offspring, the survivors or the fidelities",
            )
        if not all(0 < share <= 1 for share in (*self.fidelities, self.level)):
            raise ParameterError(
                f"fidelities {self.fidelities} and level {self.level} were asked for",
                "They are shares above 0, 1 at most",
                "Change the fidelities or the level",
            )

    @property
    def trials_per_generation(self) -> int:
        """Evaluations of one generation: every round's candidates, and the parent in the last."""
        return self.offspring + sum(self.survivors[:-1]) + 1


def evopress(
    problem: Problem,
    settings: EvoPress,
    trials: int,
    seed: int,
    on_trial: Callable[[Trial], None],
) -> Evolved:
    """Search the best policy at ``problem.sparsity``: (1 + lambda) evolution from the best known start.

    Offspring differ from the parent by one to three switches: one unit a level up, another a level down. A generation
    is thinned out in rounds of growing fidelity, each on its own draw of samples, and the parent joins the last round.

    Args:
        problem: units, target, bounds, reward and known policies.
        settings: offspring, rounds and the size of a level.
        trials: evaluations to spend, in whole generations; fewer when no switch is left.
        seed: of everything random; the same seed and rewards give the same search.
        on_trial: told of every trial.

    Raises:
        ParameterError: fewer trials than one generation takes.
        UnreachableSparsity: the best start cannot be brought on the budget, or none is known and none is possible.
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    if trials < settings.trials_per_generation:
        raise ParameterError(
            f"{trials} trials of EvoPress were asked for",
            f"One generation takes {settings.trials_per_generation}",
            "Raise the trials, or lower its offspring or survivors",
        )
    rng = np.random.default_rng(seed)
    most = problem.reward.most_samples
    samples = [max(1, round(share * most)) for share in settings.fidelities]
    starts = scored_starts(problem)
    laboratory = Laboratory(problem, on_trial)
    switches = _Switches.of(problem, settings.level)
    parent = on_budget(problem, np.array(starts[0].allocation.retention))
    draw = 0
    for _ in range(trials // settings.trials_per_generation):
        pool = _offspring(problem, parent, switches, settings.offspring, rng)
        if not pool:
            break
        for survivors, fidelity in zip(settings.survivors, samples, strict=True):
            # First in the list: an offspring must be better than the parent, not as good.
            pool = [parent, *pool] if survivors == 1 else pool
            scored = best_first(laboratory.test(pool, fidelity, draw))
            pool = [trial.allocation for trial in scored[:survivors]]
            draw += 1
        parent = pool[0]
    return conclude(problem, starts, [("last parent", parent)], laboratory.trials)


@dataclass(frozen=True)
class _Switches:
    """What may be switched; all ``[N]`` int64 but the level.

    Attributes:
        low: fewest granules of each unit.
        high: most granules.
        size: cost of one granule.
        stride: granules that move together: ``step`` channels of an FFN, which the rounding would undo otherwise.
        level: cost of a level.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    size: NDArray[np.int64]
    stride: NDArray[np.int64]
    level: int

    @classmethod
    def of(cls, problem: Problem, level: float) -> _Switches:
        low, high = limits(problem.units, problem.bounds)
        mean = total_cost(problem.units) / len(problem.units)
        return cls(
            low=np.array(low),
            high=np.array(high),
            size=np.array([unit.granule_cost for unit in problem.units]),
            stride=np.array([problem.step if unit.kind == "ffn" else 1 for unit in problem.units]),
            level=round(level * min(problem.sparsity, 1 - problem.sparsity) * mean),
        )

    def switch(self, kept: NDArray[np.int64], up: int, down: int) -> NDArray[np.int64] | None:
        """One unit a level up, another a level down, as whole granules and bounds allow; None: they do not.

        A level is at least a granule of either unit, so that a head can be paid for in channels.
        """
        pair = np.array([up, down])
        strides = (self.size * self.stride)[pair]
        room = np.array([self.high[up] - kept[up], kept[down] - self.low[down]]) * self.size[pair]
        moved = min(max(self.level, int(strides.max())), int(room.min())) // strides
        if up == down or not moved.all():
            return None
        switched = kept.copy()
        switched[pair] += moved * self.stride[pair] * [1, -1]
        return switched


def _offspring(
    problem: Problem, parent: Allocation, switches: _Switches, count: int, rng: np.random.Generator
) -> list[Allocation]:
    """Distinct mutations of the parent, on the exact budget; fewer than ``count`` where there are not as many."""
    granules = np.array([unit.granules for unit in problem.units])
    found: dict[tuple[int, ...], Allocation] = {}
    for _ in range(_ATTEMPTS * count):
        kept = np.array(parent.kept)
        for _ in range(rng.integers(1, 4, size=2).min()):  # 1 to 3, fewer more often, as published
            for _ in range(_ATTEMPTS):
                switched = switches.switch(kept, *rng.integers(len(granules), size=2))
                if switched is not None:
                    kept = switched
                    break
        # Whole granules leave gaps at the very ends of the reach; another child may fit.
        with suppress(UnreachableSparsity):
            child = on_budget(problem, kept / granules)
            if child.kept != parent.kept:
                found[child.kept] = child
        if len(found) == count:
            break
    return list(found.values())
