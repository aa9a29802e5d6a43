"""Evolutionary search, the papers' "EAS" (Shen et al. 2024, Search for Efficient Large Language Models)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ffprune.allocate.problem import Problem
from ffprune.allocate.trials import Evolved, Laboratory, Trial, best_first, conclude, on_budget, scored_starts
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.rounding import Floats
from ffprune.core.units import Allocation

_ATTEMPTS = 10
"""Children bred for one that was not tried before; the published code's patience."""


@dataclass(frozen=True)
class Evolution:
    """Settings; the defaults are those of the published code.

    Attributes:
        population: policies a generation.
        survivors: parents of the next generation: the best of all policies so far.
        mutated: children a generation that are mutations of one parent.
        crossed: children that take every unit from one of two parents. The rest of a generation is drawn afresh.
        probability: that a mutation draws a unit afresh.

    Raises:
        ParameterError: children that exceed the population, no survivors, or a probability that is none.
    """

    population: int = 50
    survivors: int = 10
    mutated: int = 25
    crossed: int = 25
    probability: float = 0.2

    def __post_init__(self) -> None:
        children = self.mutated + self.crossed
        if min(self.mutated, self.crossed) < 0 or not 0 < children <= self.population or self.survivors < 1:
            raise ParameterError(
                f"a population of {self.population} with {self.survivors} survivors, {self.mutated} mutated and "
                f"{self.crossed} crossed children was asked for",
                "There are 1 survivor or more, and 1 child or more, up to the population",
                "Raise the population or the survivors, or lower the children",
            )
        if not 0 < self.probability <= 1:
            raise ParameterError(
                f"mutation probability {self.probability} was asked for",
                "It lies above 0 and is at most 1",
                "Change the probability",
            )


def eas(
    problem: Problem,
    settings: Evolution,
    trials: int,
    seed: int,
    on_trial: Callable[[Trial], None],
) -> Evolved:
    """Search the best policy at ``problem.sparsity`` by mutation, crossover and survival of the top k.

    The first generation is the known policies and random ones. A retention drawn afresh lies evenly between 1 - 2s,
    or a_min if that is more, and a_max: around the target. The published search rejects children off the budget; here
    the exact rounding repairs them. Its mask mutation has no place: which granules a unit keeps is its ranking's
    matter. Every trial is at full fidelity on one and the same draw of samples, so that generations compare.

    Args:
        problem: units, target, bounds, reward and known policies.
        settings: sizes of a generation.
        trials: evaluations to spend, 1 or more; fewer when no policy is left that was not tried.
        seed: of everything random; the same seed and rewards give the same search.
        on_trial: told of every trial.

    Raises:
        UnreachableSparsity: no start is known, and no allocation inside the bounds has this sparsity.
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    rng = np.random.default_rng(seed)
    count, most = len(problem.units), problem.reward.most_samples
    low, high = max(problem.bounds.low, 1 - 2 * problem.sparsity), problem.bounds.high
    starts = scored_starts(problem)
    laboratory = Laboratory(problem, on_trial)
    tried: set[tuple[int, ...]] = set()
    parents: list[Trial] = []

    def fresh() -> Floats:
        return rng.uniform(low, high, count)

    def parent() -> Floats:
        return np.array(parents[rng.integers(len(parents))].allocation.retention)

    def mutated() -> Floats:
        return np.where(rng.random(count) < settings.probability, fresh(), parent())

    def crossed() -> Floats:
        return np.where(rng.random(count) < 0.5, parent(), parent())

    def untried(breed: Callable[[], Floats]) -> list[Allocation]:
        for _ in range(_ATTEMPTS):
            # Whole granules leave gaps at the very ends of the reach; another child may fit.
            with suppress(UnreachableSparsity):
                child = on_budget(problem, breed())
                if child.kept not in tried:
                    tried.add(child.kept)
                    return [child]
        return []

    known = [np.array(start.allocation.retention) for start in starts]
    breeders = [*(lambda start=start: start for start in known), *[fresh] * (settings.population - len(known))]
    while len(laboratory.trials) < trials:
        children = [child for breed in breeders[: trials - len(laboratory.trials)] for child in untried(breed)]
        if not children:
            break
        parents = best_first([*parents, *laboratory.test(children, most, 0)])[: settings.survivors]
        breeders = [mutated] * settings.mutated + [crossed] * settings.crossed
        breeders += [fresh] * (settings.population - len(breeders))
    best = [(f"trial {trial.number}", trial.allocation) for trial in parents[:1]]
    return conclude(problem, starts, best, laboratory.trials)
