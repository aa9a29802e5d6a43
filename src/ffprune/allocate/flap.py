"""FLAP's allocation: one threshold over all standardised granules ("AL-AM"; An et al. 2024, METHODS 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds, check_reachable, least_count, limits
from ffprune.core.errors import ParameterError
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit, removed, total_cost

Floats = NDArray[np.float64]


def global_threshold(units: Sequence[Unit], scores: Sequence[Floats], sparsity: float, bounds: Bounds) -> Allocation:
    """Keep the granules whose standardised score is above one threshold, weighed by their parameters.

    As in the published code, scores are standardised within each layer's attention and each layer's FFN (z-score over
    the unit's columns, unbiased deviation), a granule is the mean of its columns, and the threshold is the one that
    comes nearest to the budget. Granules differ in size, so that one leaves up to half a head too much or too little:
    the smallest granules (channels) get their own threshold next to it, which makes the budget exact. A unit's
    best granules stay whatever their score, as many as the bounds ask for and one at least.

    Args:
        units: N structured units.
        scores: per unit, float64 ``[granules, width]``, scores of the columns of its granules
            (:func:`ffprune.core.fluctuation.wifv`), or ``[granules]``; flat ``[granules * width]`` will do.
        sparsity: target, removed / all cost.
        bounds: retention bounds.

    Raises:
        ParameterError: a unit is a weight matrix.
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
        ValueError: scores that do not fit their unit, or are not finite.
    """
    if any(unit.kind == "weight" for unit in units):
        raise ParameterError(
            "allocator flap was asked for weight matrices",
            "FLAP compares whole heads and channels, which only structured units have",
            "Choose another allocator, such as owl, or a structured compressor",
        )
    check_reachable(units, sparsity, bounds)
    low, high = limits(units, bounds)
    # A unit's granules from the worst: what is above `most` is gone, the best `fewest` cannot go, the rest compete.
    levels = [
        np.sort(_standardised(unit, score))[unit.granules - most : unit.granules - fewest]
        for unit, score, fewest, most in zip(units, scores, low, high, strict=True)
    ]
    owner = np.repeat(np.arange(len(units)), [len(level) for level in levels])
    owner = owner[np.argsort(np.concatenate(levels), kind="stable")]
    sizes = np.array([unit.granule_cost for unit in units])
    target = least_count(sparsity, total_cost(units))
    missing = target - removed(units, high)
    gone = np.concatenate([[0], np.cumsum(sizes[owner])])
    # The last of equals: of two thresholds as near to the budget, the one that removes more.
    worst = owner[: len(owner) - np.abs(gone - missing)[::-1].argmin()]
    fine = sizes == sizes.min()
    coarse = np.bincount(worst[~fine[worst]], minlength=len(units))
    channels = max(0, -(-(missing - int(coarse @ sizes)) // int(sizes.min())))
    lost = coarse + np.bincount(owner[fine[owner]][:channels], minlength=len(units))
    retentions = (np.array(high) - lost) / np.array([unit.granules for unit in units])
    # On the exact budget already, unless channels alone could not make up for a head.
    return to_allocation(retentions, retentions, units, sparsity, bounds)


def _standardised(unit: Unit, scores: Floats) -> Floats:
    """Mean z-score of every granule's columns, float64 ``[granules]``; columns that do not differ are all at 0."""
    columns = np.asarray(scores, dtype=np.float64)
    if columns.size == 0 or columns.size % unit.granules or not np.isfinite(columns).all():
        raise ValueError(f"{unit.name}: {columns.size} scores for {unit.granules} granules, or not all are finite")
    deviation = columns.std(ddof=1) if columns.size > 1 else 0.0
    levels = (columns - columns.mean()).reshape(unit.granules, -1).mean(1)
    standardised: Floats = levels / deviation if deviation > 0 else np.zeros_like(levels)
    return standardised
