"""Twins of ffprune.allocate.flap: everything sorted in one Python list."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ffprune.core.budget import Bounds, least_count
from ffprune.core.units import Unit


def standardised(columns: Sequence[float], width: int) -> list[float]:
    """z-scores of the columns, unbiased deviation; then the mean of every granule's columns."""
    mean = math.fsum(columns) / len(columns)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in columns) / (len(columns) - 1))
    z = [(x - mean) / deviation for x in columns]
    return [math.fsum(z[g : g + width]) / width for g in range(0, len(z), width)]


def equal_granules(
    units: Sequence[Unit], scores: Sequence[Sequence[float]], sparsity: float, bounds: Bounds
) -> list[int]:
    """Granules of one size: the worst go, one by one, until the share that is gone reaches the target.

    First of all go those of units above their bound; those of units at their lower bound, or the last, stay.
    """
    total = sum(unit.granules for unit in units)
    pool = sorted((z, i) for i, score in enumerate(scores) for z in standardised(score, 1))
    kept = [unit.granules for unit in units]
    for _, i in pool:
        if kept[i] / units[i].granules > bounds.high:
            kept[i] -= 1
    surplus = [unit.granules - k for unit, k in zip(units, kept, strict=True)]
    for _, i in pool:
        if (total - sum(kept)) / total >= sparsity:
            break
        if surplus[i]:  # went before
            surplus[i] -= 1
        elif kept[i] > 1 and (kept[i] - 1) / units[i].granules >= bounds.low:
            kept[i] -= 1
    return kept


def published(
    units: Sequence[Unit], scores: Sequence[Sequence[float]], widths: Sequence[int], sparsity: float
) -> list[int]:
    """The published rule: granules from the best, weighed by parameters; cut where the sum comes nearest to the budget.

    (There the granule at the threshold itself goes too; here it stays.)
    """
    pool = sorted(
        (
            (z, i)
            for i, (score, width) in enumerate(zip(scores, widths, strict=True))
            for z in standardised(score, width)
        ),
        reverse=True,
    )
    whole = sum(unit.params for unit in units)
    budget = whole - least_count(sparsity, whole)
    sums = list(itertools.accumulate((units[i].params_per_granule for _, i in pool), initial=0))
    cut = min(range(len(sums)), key=lambda k: abs(sums[k] - budget))
    return [sum(i == unit for _, i in pool[:cut]) for unit in range(len(units))]
