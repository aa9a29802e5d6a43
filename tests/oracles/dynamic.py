"""Twin of ffprune.allocate.dynamic: every allocation there is, tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds
from ffprune.core.units import Allocation, Unit


def cheapest(
    units: Sequence[Unit], curves: Sequence[NDArray[np.float64]], sparsity: float, bounds: Bounds
) -> tuple[float, Allocation]:
    """The least sum of losses on the exact budget of METHODS 1, inside the bounds, and where it is reached."""
    smallest = min(unit.params_per_granule for unit in units)
    total = sum(unit.params for unit in units)
    ranges = [
        [k for k in range(1, u.granules + 1) if bounds.low <= k / u.granules <= bounds.high or k == 1 > u.granules]
        for u in units
    ]
    best, found = math.inf, None
    for kept in itertools.product(*ranges):
        allocation = Allocation(tuple(units), kept)
        if allocation.sparsity < sparsity or (allocation.removed - smallest) / total >= sparsity:
            continue
        loss = sum(float(curve[k]) for curve, k in zip(curves, kept, strict=True))
        if loss < best:
            best, found = loss, allocation
    assert found is not None
    return best, found
