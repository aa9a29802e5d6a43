"""From retentions to whole granules on the exact budget: DiscretizeAndCorrect (FF Alg. 1 line 13, METHODS 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds, check_reachable, least_count, limits
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.uneven import CostTable
from ffprune.core.units import Allocation, Unit, removed, total_cost

Floats = NDArray[np.float64]


def sizes_of(units: Sequence[Unit]) -> Floats:
    """Cost (without a price: prunable weights) of every dense unit, float64 ``[N]``."""
    return np.array([unit.dense_cost for unit in units], dtype=np.float64)


def level(shares: Floats, sizes: Floats, low: Floats, high: Floats, budget: float | Floats) -> Floats:
    """clip(shares + tau, low, high) with the tau for which sizes * shares sum to the budget.

    The sum grows with tau, which makes bisection safe; all shares lie in [0, 1], which bounds tau.

    Args:
        shares: ``[..., N]``, several problems at once.
        sizes: ``[N]``.
        low: ``[N]``.
        high: ``[N]``.
        budget: ``[...]``, one a problem.
    """
    below, above = np.full(shares.shape[:-1], -1.0), np.full(shares.shape[:-1], 1.0)
    # 64 halvings leave less than the spacing of floats near one.
    for _ in range(64):
        tau = (below + above) / 2
        short = (np.clip(shares + tau[..., None], low, high) * sizes).sum(-1) < budget
        below, above = np.where(short, tau, below), np.where(short, above, tau)
    levelled: Floats = np.clip(shares + above[..., None], low, high)
    return levelled


@dataclass(frozen=True)
class _Rounding:
    """What the steps of :func:`to_allocation` share.

    Attributes:
        units: N prunable units.
        low: fewest granules of each unit.
        high: most granules of each unit.
        first: fewest granules on the unit's grid of steps.
        last: most granules on that grid.
        grid: granules a step; 1 for attention, and for an FFN so narrow that no multiple fits.
        smallest: cost of the smallest granule.
        target: least cost to remove.
        order: indices of the units, highest score first.
    """

    units: Sequence[Unit]
    low: list[int]
    high: list[int]
    first: list[int]
    last: list[int]
    grid: list[int]
    smallest: int
    target: int
    order: list[int]

    @classmethod
    def of(cls, units: Sequence[Unit], scores: Floats, sparsity: float, bounds: Bounds, step: int) -> _Rounding:
        low, high = limits(units, bounds)
        first, last, grid = [], [], []
        for unit, fewest, most in zip(units, low, high, strict=True):
            on_grid = -(-fewest // step) * step, most // step * step
            narrow = unit.kind != "ffn" or on_grid[0] > on_grid[1]
            first.append(fewest if narrow else on_grid[0])
            last.append(most if narrow else on_grid[1])
            grid.append(1 if narrow else step)
        return cls(
            units=units,
            low=low,
            high=high,
            first=first,
            last=last,
            grid=grid,
            smallest=min(unit.granule_cost for unit in units),
            target=least_count(sparsity, total_cost(units)),
            order=[int(i) for i in np.argsort(-scores, kind="stable")],
        )

    @property
    def fine(self) -> list[int]:
        """Units with the smallest granule (FFN channels), highest score first."""
        return [i for i in self.order if self.units[i].granule_cost == self.smallest]

    def excess(self, kept: Sequence[int]) -> int:
        """Smallest granules still to remove; negative: to give back."""
        return -(-(self.target - removed(self.units, kept)) // self.smallest)


def _nearest(retentions: Floats, to: _Rounding) -> list[int]:
    """Every unit to the nearest whole granules on its grid."""
    kept = []
    for i, unit in enumerate(to.units):
        wanted = math.floor(float(retentions[i]) * unit.granules / to.grid[i] + 0.5) * to.grid[i]
        kept.append(min(max(wanted, to.first[i]), to.last[i]))
    return kept


def _correct_coarse(kept: list[int], to: _Rounding) -> list[int]:
    """Move units of large granules, by score, only until those of the smallest can take the remainder."""
    fine, kept = set(to.fine), list(kept)
    most_removed = removed(to.units, [to.low[i] if i in fine else k for i, k in enumerate(kept)])
    least_removed = removed(to.units, [to.high[i] if i in fine else k for i, k in enumerate(kept)])
    sign = 1 if most_removed < to.target else -1
    missing = to.target - most_removed if sign > 0 else least_removed - (to.target + to.smallest - 1)
    for i in to.order:
        if missing <= 0:
            break
        if i not in fine:
            size = to.units[i].granule_cost
            room = kept[i] - to.low[i] if sign > 0 else to.high[i] - kept[i]
            moved = min(room, -(-missing // size))
            kept[i] -= sign * moved
            missing -= moved * size
    return kept


def _level_fine(kept: list[int], retentions: Floats, to: _Rounding) -> list[int]:
    """Units of the smallest granule absorb what the others' rounding cost, all by the same share.

    Then every one is cut down to its grid, and whole steps go to those that the cut cost most.
    """
    fine, kept = to.fine, list(kept)
    budget = sum(kept[i] for i in fine) - to.excess(kept)
    budget = min(max(budget, sum(to.first[i] for i in fine)), sum(to.last[i] for i in fine))
    sizes = sizes_of(to.units)[fine] / to.smallest
    low, high = (np.array([ends[i] for i in fine]) / sizes for ends in (to.first, to.last))
    wanted = level(retentions[fine], sizes, low, high, budget) * sizes
    lost = {}
    for i, channels in zip(fine, wanted, strict=True):
        kept[i] = max(math.floor(channels / to.grid[i]) * to.grid[i], to.first[i])
        # Rounded, so that ties are decided by score and not by the last bit.
        lost[i] = round((channels - kept[i]) / to.grid[i], 6)
    missing = budget - sum(kept[i] for i in fine)
    for i in sorted(fine, key=lambda i: -lost[i]):
        if to.grid[i] <= min(missing, to.last[i] - kept[i]):
            kept[i] += to.grid[i]
            missing -= to.grid[i]
    return kept


def _correct_fine(kept: list[int], to: _Rounding) -> list[int]:
    """The remainder, less than a step unless the bounds are in the way, goes to the highest score."""
    excess, kept = to.excess(kept), list(kept)
    room = {i: kept[i] - to.low[i] if excess > 0 else to.high[i] - kept[i] for i in to.fine}
    # First come units with room for all of it, so that only one leaves the grid; failing that, several.
    for i in sorted(room, key=lambda i: room[i] < abs(excess)):
        moved = min(abs(excess), room[i])
        moved = moved if excess > 0 else -moved
        kept[i] -= moved
        excess -= moved
    return kept


def _fit_uneven(retentions: Floats, to: _Rounding) -> list[int]:
    """Where granules differ in price: as much as the budget affords, so that no unit can keep a granule more.

    All retentions are shifted by the largest common amount that is affordable once rounded to the grid. What is left
    gives a step each to those that rounding cost most, as long as one fits, and then single granules by score.
    """
    table = CostTable(to.units)
    affordable = table.of(table.granules) - to.target
    ends = to.first, to.last, to.grid
    if table.of(np.array(to.first)) > affordable:  # only off the grid can so little be kept
        ends = to.low, to.high, [1] * len(to.units)
    first, last, grid = (np.array(end) for end in ends)
    steps = table.granules / grid

    def shifted(tau: float) -> NDArray[np.int64]:
        nearest = np.floor(np.clip(retentions + tau, 0, 1) * steps + 0.5).astype(np.int64) * grid
        kept: NDArray[np.int64] = np.clip(nearest, first, last)
        return kept

    below, above = -1.0, 1.0
    for _ in range(64):
        tau = (below + above) / 2
        below, above = (tau, above) if table.of(shifted(tau)) <= affordable else (below, tau)
    kept = [int(k) for k in shifted(below)]
    left = affordable - table.of(np.array(kept))
    # Rounded, so that ties are decided by score and not by the last bit.
    lost = np.round((retentions + below) * steps - np.array(kept) / grid, 6)
    order = sorted(to.order, key=lambda i: -lost[i])
    moved = True
    while moved:
        moved = False
        for i in order:
            more = kept[i] + int(grid[i])
            if more <= last[i] and (price := to.units[i].cost(more) - to.units[i].cost(kept[i])) <= left:
                kept[i], left, moved = more, left - price, True
    for i in to.order:
        before = to.units[i].cost(kept[i])
        kept[i] = min(to.high[i], to.units[i].affordable(before + left))
        left -= to.units[i].cost(kept[i]) - before
    return kept


def to_allocation(
    retentions: Floats,
    scores: Floats,
    units: Sequence[Unit],
    sparsity: float,
    bounds: Bounds,
    step: int = 1,
    *,
    exact: bool = True,
) -> Allocation:
    """DiscretizeAndCorrect (FF Alg. 1 line 13, METHODS 2): whole granules on the exact budget of METHODS 1.

    The paper rounds to 0.01 and lets the unit with the highest score pay for all rounding. Granules are
    coarser (a third of an attention block, or ``step`` channels), and so would the bill be: uniform scores on
    30 layers would drive the first FFNs to a_min. Hence, in this order:

    1. attention is rounded to the nearest granule, and moved further (highest score first) only if the
       channels inside the bounds could not make up for it;
    2. FFN retentions are shifted by the one amount that makes up for it, and rounded to multiples of ``step``
       by largest remainder, so that less than one step is left;
    3. that remainder goes to the unit with the highest score, and to the next one if that one is at a
       bound, until the budget is exact (FF 2.1, METHODS 2). It is the only FFN off the grid of steps, as far
       as the bounds allow.

    "FFN" above is whatever units have the smallest granule. Exactness is theirs: one channel, or one
    attention granule if there is no FFN. Sizes are what the budget counts: parameters, or the units' price.

    Where granules of one unit differ in price (measured latency), there is no smallest one: all retentions are
    shifted by the largest common amount that the budget affords, and whole steps, then single granules, are kept as
    far as they fit. Exact then means that no unit can keep a granule more.

    Args:
        retentions: [N] float64, shares kept, from a mapping or an allocator; they need not be on budget.
        scores: [N] float64; only their order is used. Ties go to the unit listed first.
        units: N prunable units.
        sparsity: target, removed / all cost (without a price: prunable parameters).
        bounds: retention bounds, never left.
        step: grid of FFN channels, for widths that suit the hardware.
        exact: meet the budget from both sides. False: only never fall below the target, for mappings that
            may prune more than asked; the achieved value is :attr:`Allocation.saved`.

    Returns:
        An allocation with achieved sparsity >= target and, if exact, less than one smallest granule above.

    Raises:
        UnreachableSparsity: the target is outside the reachable range, or (only when the units of the
            smallest granule have less room inside the bounds than one of the largest granules) the
            correction finds no whole granules that meet it.
        ParameterError: ``step`` is below 1, or a unit has no whole number of granules inside the bounds.
        ValueError: wrong shapes, or scores or retentions that are not numbers.
    """
    for what, values in (("retentions", retentions), ("scores", scores)):
        if np.shape(values) != (len(units),) or np.isnan(values).any():
            raise ValueError(f"{what} must be {len(units)} numbers, one per unit, without NaN")
    if step < 1:
        raise ParameterError(f"step {step} was asked for", "Steps are 1 channel or more", "Raise the step")
    check_reachable(units, sparsity, bounds)
    to = _Rounding.of(units, np.asarray(scores, dtype=np.float64), sparsity, bounds, step)
    shares = np.clip(np.asarray(retentions, dtype=np.float64), bounds.low, bounds.high)
    kept = _nearest(shares, to)
    enough = not exact and removed(units, kept) >= to.target
    if any(unit.uneven for unit in units):
        kept = kept if enough else _fit_uneven(shares, to)
    elif not enough:
        kept = _correct_fine(_level_fine(_correct_coarse(kept, to), shares, to), to)
        surplus = removed(units, kept) - to.target
        if surplus < 0 or (exact and surplus >= to.smallest):
            raise UnreachableSparsity(
                f"sparsity {sparsity} was asked for",
                f"Whole granules inside bounds [{bounds.low}, {bounds.high}] come to "
                f"{Allocation(tuple(units), tuple(kept)).saved:.6f}, since large granules leave gaps",
                "Widen search.min_keep and search.max_keep, or take that target",
            )
    return Allocation(tuple(units), tuple(kept))
