"""Twin of ffprune.allocate.multi_step: which counts of one unit leave a budget that the later ones can still meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ffprune.core.budget import Bounds
from ffprune.core.units import Allocation, Unit
from tests.oracles.policy import granule_limits, is_exact


def completable(units: Sequence[Unit], kept: Sequence[int], sparsity: float, bounds: Bounds) -> set[int]:
    """Counts of the next unit for which some counts of the later units meet the exact budget, by trying all."""
    smallest = min(unit.params_per_granule for unit in units)
    free = [granule_limits(unit, bounds) for unit in units[len(kept) :]]
    return {
        rest[0]
        for rest in itertools.product(*free)
        if is_exact(Allocation(tuple(units), (*kept, *rest)), sparsity, smallest)
    }
