"""What every allocator is asked: spend this budget on these units, scored by an injected reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.policy import map_scores
from ffprune.core.units import Allocation, Unit


class Reward(Protocol):
    """Evaluates policies on the really pruned model."""

    @property
    def most_samples(self) -> int:
        """N_max of FF Eq. 5: samples at full fidelity."""

    @property
    def fixed(self) -> int:
        """How many fixed samples there are to compare what a search found."""

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        """Score the policies of one round on the same samples.

        A search asks for all that it knows it will try, so that trials may run side by side.

        Args:
            allocations: the policies.
            samples: which samples.

        Returns:
            One outcome a policy, in this order, each as soon as it and those before it are known; to be read to the
            end. An outcome depends on its policy and samples alone, not on what else is asked or was before.
        """


@dataclass(frozen=True)
class Standing:
    """How far a race of candidates (:mod:`ffprune.allocate.race`) is.

    Attributes:
        read: samples that policies have read in it so far, each policy's counted.
        most: samples that they will read in all, at most.
        best: name of the policy that is ahead on the text of this lap; empty before the first has read it.
        perplexity: its perplexity on that text; infinite where it is not finite or there is none.
        starts: whether the race has just begun.
    """

    read: int
    most: int
    best: str = ""
    perplexity: float = math.inf
    starts: bool = False


def _unwatched(standing: Standing) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Problem:
    """Units, target, bounds and a reward: all that an allocator may know.

    Attributes:
        units: prunable units.
        sparsity: target, removed / all cost.
        bounds: retention bounds of every unit.
        mapping: row of :data:`ffprune.core.policy.MAPPINGS`.
        step: FFN channels go in multiples of this during search.
        reward: evaluates a policy.
        starts: named policies known beforehand; the best of them is where a search starts.
        on_race: told how far a race is: as it begins, with every lap and every policy.
    """

    units: tuple[Unit, ...]
    sparsity: float
    bounds: Bounds
    mapping: str
    step: int
    reward: Reward
    starts: dict[str, Allocation] = field(default_factory=dict)
    on_race: Callable[[Standing], None] = _unwatched

    def allocate(self, scores: NDArray[np.float64], sparsity: float) -> Allocation:
        """The policy mapping F (FF Alg. 1) under this problem's bounds."""
        return map_scores(scores, self.units, sparsity, self.bounds, self.mapping, self.step)


def distinct(allocations: Sequence[tuple[str, Allocation]]) -> list[tuple[str, Allocation]]:
    """Drop later copies of the same policy, keeping the first name."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for name, allocation in allocations:
        if allocation.kept not in seen:
            seen.add(allocation.kept)
            kept.append((name, allocation))
    return kept
