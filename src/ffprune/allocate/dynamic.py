"""Dynamic programming over per-unit loss curves: the best allocation if losses added up.

It is the natural starting policy of a search: cheap, and blind only to what units do to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds, check_reachable, least_count, limits
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit, total_cost

_COINS = 5000
"""Into which all cost is divided where granules have no common size: a fiftieth of a percent each."""


def dynamic_programming(
    units: Sequence[Unit],
    curves: Sequence[NDArray[np.float64]],
    sparsity: float,
    bounds: Bounds,
    step: int,
) -> Allocation:
    """Minimise the sum of the units' losses on the budget (a multiple-choice knapsack).

    Budgets are counted in coins of ``step`` of the smallest granules, in which larger granules and levels are
    rounded; :func:`to_allocation` then makes the result exact. Where granules of a unit differ in price, a coin is a
    fiftieth of a percent of all cost, and an allocation may cost less than the budget, if its loss is less.

    Args:
        units: N prunable units.
        curves: per unit, float64 ``[m]``: the loss at m equally spaced retentions from 0 to 1; m = granules + 1 is
            every number of granules, and a matrix of a million weights does with a few levels.
        sparsity: target, removed / all cost.
        bounds: retention bounds.
        step: FFN channels are removed in multiples of this; 1 is exact and slow. For matrices the coin alone.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
    """
    return front(units, curves, [sparsity], bounds, step)[0]


def front(
    units: Sequence[Unit],
    curves: Sequence[NDArray[np.float64]],
    sparsities: Sequence[float],
    bounds: Bounds,
    step: int,
) -> list[Allocation]:
    """:func:`dynamic_programming` at several sparsities, from one table: hardly slower than at the highest alone."""
    for sparsity in sparsities:
        check_reachable(units, sparsity, bounds)
    uneven = any(unit.uneven for unit in units)
    smallest = max(1, total_cost(units) // _COINS) if uneven else min(u.granule_cost for u in units)
    per_coin = 1 if uneven else step
    options = [
        _options(unit, curve, fewest, most, step, smallest * per_coin)
        for unit, curve, fewest, most in zip(units, curves, *limits(units, bounds), strict=True)
    ]
    most = sum(int(weights.max()) for _, weights, _ in options)
    # The exact budgets in smallest granules, rounded up, then in coins: with step 1 nothing is left to correct.
    granules = [-(-least_count(sparsity, total_cost(units)) // smallest) for sparsity in sparsities]
    needs = [min(most, round(count / per_coin)) for count in granules]
    if not uneven:
        # From a sum below the need, units go to their most one after the other: one step leads to it or past it.
        least = sum(int(weights.min()) for _, weights, _ in options)
        most = min(most, max(least, *needs) + max(int(weights.max()) for _, weights, _ in options))
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _, weights, losses in options:
        # candidates[j, b]: spend weights[j] here, the rest of b on the units before.
        candidates = np.full((len(weights), most + 1), np.inf)
        for j, (weight, loss) in enumerate(zip(weights, losses, strict=True)):
            candidates[j, weight:] = best[: most + 1 - weight] + loss
        choices.append(candidates.argmin(0))
        best = candidates.min(0)
    found = []
    for sparsity, need in zip(sparsities, needs, strict=True):
        # Rounded attention granules can leave the exact sum out of reach: take the nearest above. Uneven prices make
        # no sum special: take the least loss.
        left = need + int(best[need:].argmin() if uneven else np.flatnonzero(np.isfinite(best[need:]))[0])
        kept = [0] * len(units)
        for i in range(len(units) - 1, -1, -1):
            counts, weights, _ = options[i]
            j = int(choices[i][left])
            kept[i], left = int(counts[j]), left - int(weights[j])
        retentions = np.array([k / u.granules for u, k in zip(units, kept, strict=True)])
        found.append(to_allocation(retentions, retentions, units, sparsity, bounds, step))
    return found


def coin(units: Sequence[Unit], step: int) -> int:
    """The step to plan with: the search's own, but for matrices as fine as curves need and a table of sums can hold."""
    return max(1, sum(unit.params for unit in units) // 5000) if units[0].kind == "weight" else step


def _options(
    unit: Unit, curve: NDArray[np.float64], fewest: int, most: int, step: int, coin: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Counts that a unit may keep, what removing the rest is worth in coins, and what it costs in loss."""
    stride = step if unit.kind == "ffn" else 1
    levels = np.arange(len(curve) - 1, 0, -stride)
    kept = np.rint(levels / (len(curve) - 1) * unit.granules).astype(np.int64)
    inside = np.flatnonzero((kept >= fewest) & (kept <= most))
    if len(inside) == 0:  # bounds narrower than a step
        inside = np.array([np.abs(kept - most).argmin()])
    levels, kept = levels[inside], kept[inside].clip(fewest, most)
    weights = np.rint((unit.dense_cost - unit.costs(kept)) / coin).astype(np.int64)
    return kept, weights, curve[levels]
