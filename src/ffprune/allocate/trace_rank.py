"""Sparsity by rank of the Hessian trace (MS Alg. 1): of every unit, or of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit


def trace_rank(
    units: Sequence[Unit],
    sensitivity: NDArray[np.float64],
    sparsity: float,
    half_width: float,
    bounds: Bounds,
    step: int,
    by_layer: bool = False,
) -> Allocation:
    """Retention grows linearly with the rank of a unit's sensitivity, from 1 - p - alpha to 1 - p + alpha.

    Alg. 1 calls its output sparsity; only as retention does it give overall sparsity p (METHODS 6). Units differ in
    size, so a common shift then meets the exact budget.

    Args:
        units: prunable units.
        sensitivity: float64 ``[N]``, average Hessian trace of each unit's matrices (MS Eq. 6).
        sparsity: p, removed / all cost.
        half_width: alpha.
        bounds: retention bounds.
        step: FFN channels go in multiples of this.
        by_layer: layer-level allocation (MS section 2.3.2): the units of a layer share the rank of their sum.
    """
    groups = np.array([unit.layer for unit in units]) if by_layer else np.arange(len(units))
    names, member = np.unique(groups, return_inverse=True)
    sums = np.bincount(member, weights=sensitivity).astype(np.float64)
    ranks = np.argsort(np.argsort(sums, kind="stable"), kind="stable")
    low = 1 - sparsity - half_width
    retentions = low + ranks[member] * 2 * half_width / max(len(names) - 1, 1)
    return to_allocation(retentions, sums[member], units, sparsity, bounds, step)
