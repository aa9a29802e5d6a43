"""Twins of budgets whose granules differ in price: loops over whole granules, and plain enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ffprune.core.budget import Bounds
from ffprune.core.units import Unit
from tests.oracles.policy import granule_limits


def cost(unit: Unit, kept: int) -> int:
    """What a unit costs, granule by granule."""
    if isinstance(unit.price, np.ndarray):
        return int(unit.price[kept])
    return sum(unit.params_per_granule if unit.price is None else unit.price for _ in range(kept))


def meets(units: Sequence[Unit], kept: Sequence[int], sparsity: float) -> bool:
    """Whether what is removed is at least the target, as a share of all there is."""
    dense = sum(cost(unit, unit.granules) for unit in units)
    return (dense - sum(cost(u, k) for u, k in zip(units, kept, strict=True))) / dense >= sparsity


def is_tight(units: Sequence[Unit], kept: Sequence[int], sparsity: float, bounds: Bounds) -> bool:
    """On target, inside the bounds, and below target with any one granule more."""
    allowed = [granule_limits(unit, bounds) for unit in units]
    if not meets(units, kept, sparsity) or not all(k in a for k, a in zip(kept, allowed, strict=True)):
        return False
    more = ([k + (i == j) for j, k in enumerate(kept)] for i in range(len(units)) if kept[i] + 1 in allowed[i])
    return not any(meets(units, other, sparsity) for other in more)


def least_loss(units: Sequence[Unit], curves: Sequence[np.ndarray], sparsity: float, bounds: Bounds) -> float:
    """The least sum of losses of all policies on target inside the bounds."""
    best = math.inf
    for kept in itertools.product(*(granule_limits(unit, bounds) for unit in units)):
        if meets(units, kept, sparsity):
            best = min(best, sum(float(curve[k]) for curve, k in zip(curves, kept, strict=True)))
    return best


def isotonic(values: Sequence[float]) -> list[float]:
    """The minimax formula of isotonic regression: the least, over what follows, of the greatest mean up to there."""
    count = len(values)

    def mean(first: int, last: int) -> float:
        return math.fsum(values[first : last + 1]) / (last + 1 - first)

    return [max(min(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)]
