"""From unbounded scores to an exact allocation: the policy mapping F of FF Alg. 1, SS Alg. 1 and our own.

Three steps, each usable alone: a mapping of :data:`MAPPINGS` (scores -> retentions in float), then
:func:`to_allocation` (retentions -> whole granules on an exact budget), composed by :func:`map_scores`.

Budgets are compared as :attr:`Allocation.sparsity` reports them: the target is met when
``removed / prunable >= sparsity`` in floating point, so that 0.1 of 30 weights is 3 weights and not 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation, Unit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest retention of every unit ([a_min, a_max] in FF Alg. 1).

    Attributes:
        low: a_min, a share of a unit's granules.
        high: a_max, a share of a unit's granules.

    Raises:
        ParameterError: unless 0 <= low < high <= 1.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ParameterError(
                f"search.min_keep {self.low} and search.max_keep {self.high} were asked for",
                "Retentions are shares with 0 <= min_keep < max_keep <= 1",
                "Change search.min_keep or search.max_keep",
            )


Mapping = Callable[[Floats, Sequence[Unit], float, Bounds], Floats]
"""(scores [N] float64, units, sparsity, bounds) -> retentions [N] float64."""


def least_count(share: float, whole: int) -> int:
    """The smallest count with ``count / whole >= share``; immune to ``0.1 * 30 == 3.0000000000000004``."""
    count = math.ceil(share * whole)
    while count > 0 and (count - 1) / whole >= share:
        count -= 1
    while count / whole < share:
        count += 1
    return count


def _most_count(share: float, whole: int) -> int:
    """The largest count with ``count / whole <= share``."""
    count = math.floor(share * whole)
    while (count + 1) / whole <= share:
        count += 1
    while count / whole > share:
        count -= 1
    return count


def limits(units: Sequence[Unit], bounds: Bounds) -> tuple[list[int], list[int]]:
    """Fewest and most granules each unit may keep; never zero, since an empty block cannot be exported."""
    low = [max(1, least_count(bounds.low, unit.granules)) for unit in units]
    high = [_most_count(bounds.high, unit.granules) for unit in units]
    for unit, fewest, most in zip(units, low, high, strict=True):
        if fewest > most:
            raise ParameterError(
                f"bounds [{bounds.low}, {bounds.high}] were asked for",
                f"{unit.name} has {unit.granules} granules, and no whole number of them lies within",
                "Raise search.max_keep or lower search.min_keep",
            )
    return low, high


def _removed(units: Sequence[Unit], kept: Sequence[int]) -> int:
    return sum((u.granules - k) * u.params_per_granule for u, k in zip(units, kept, strict=True))


def reachable(units: Sequence[Unit], bounds: Bounds) -> tuple[float, float]:
    """Lowest and highest sparsity that whole granules reach inside the bounds (METHODS 1 and 2).

    Each unit keeps between ``ceil(low * granules)``, at least one, and ``floor(high * granules)`` granules.

    Args:
        units: the prunable units.
        bounds: the retention bounds.

    Returns:
        (lowest, highest) sparsity: removed / prunable parameters.

    Raises:
        ParameterError: a unit has no whole number of granules inside the bounds.
    """
    low, high = limits(units, bounds)
    total = sum(unit.params for unit in units)
    return _removed(units, high) / total, _removed(units, low) / total


def check_reachable(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> None:
    """Refuse a target that no allocation inside the bounds reaches (METHODS 2).

    Args:
        units: the prunable units.
        sparsity: target, removed / prunable parameters.
        bounds: the retention bounds.

    Raises:
        UnreachableSparsity: the target lies outside :func:`reachable`.
        ParameterError: a unit has no whole number of granules inside the bounds.
    """
    lowest, highest = reachable(units, bounds)
    if lowest <= sparsity <= highest:
        return
    # Printed ends are rounded inwards: a user who types them back must not be refused again.
    first, last = least_count(lowest, 1000) / 1000, _most_count(highest, 1000) / 1000
    knob = "Raise search.max_keep" if sparsity < lowest else "Lower search.min_keep"
    raise UnreachableSparsity(
        f"sparsity {sparsity} was asked for",
        f"Bounds [{bounds.low}, {bounds.high}] reach {first:.3f} to {last:.3f}",
        f"{knob} or {'raise ' if sparsity < lowest else ''}the target",
    )


def _squash(scores: Floats) -> Floats:
    """(tanh(A) + 1) / 2, the meaning of FF Alg. 1 line 1 (see :func:`greedy_fill`)."""
    return (np.tanh(scores) + 1) / 2


def _sizes(units: Sequence[Unit]) -> Floats:
    return np.array([unit.params for unit in units], dtype=np.float64)


def _level(shares: Floats, sizes: Floats, low: Floats, high: Floats, budget: float) -> Floats:
    """clip(shares + tau, low, high) with the tau for which sizes * shares sum to the budget; all [N].

    The sum grows with tau, which makes bisection safe; all shares lie in [0, 1], which bounds tau.
    """
    below, above = -1.0, 1.0
    # 64 halvings leave less than the spacing of floats near one.
    for _ in range(64):
        tau = (below + above) / 2
        if (np.clip(shares + tau, low, high) * sizes).sum() < budget:
            below = tau
        else:
            above = tau
    levelled: Floats = np.clip(shares + above, low, high)
    return levelled


def greedy_fill(scores: Floats, units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Floats:
    """FF Alg. 1, lines 1-12: every unit starts at a_min, the budget fills units by falling score.

    Line 1 prints ``clip(tanh(A + 1) / 2, 0, 1)``, which cannot exceed 0.5 and sends half of all actions to
    nearly nothing; ``(tanh(A) + 1) / 2`` is what is meant (METHODS 2). Only the order of the scores matters,
    and all units but one end at a_min or a_max. Ties go to the unit listed first.

    Args:
        scores: [N] float64, unbounded (A_t).
        units: N prunable units (w_i is ``unit.params``).
        sparsity: target, removed / prunable parameters (1 - P).
        bounds: [a_min, a_max].

    Returns:
        [N] float64 retentions, on budget up to float rounding, before DiscretizeAndCorrect.
    """
    sizes = _sizes(units)
    preference = _squash(scores) * (bounds.high - bounds.low) + bounds.low
    retentions = np.full(len(units), bounds.low)
    remaining = (1 - sparsity) * sizes.sum() - (retentions * sizes).sum()
    for i in np.argsort(-preference, kind="stable"):
        if remaining <= 0:
            break
        given = min(remaining, (bounds.high - retentions[i]) * sizes[i])
        retentions[i] += given / sizes[i]
        remaining -= given
    return retentions


def sequential_cap(scores: Floats, units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Floats:
    """SS Alg. 1: scale, clip, round to whole parameters, then cap each unit by what earlier ones left.

    The cap only lowers retentions, so low scores prune **more** than asked: read the achieved sparsity off
    the allocation. Its line 1 is misprinted as FF's is, and read as ``(tanh(A) + 1) / 2`` (METHODS 2).

    Args:
        scores: [N] float64, unbounded (A_t).
        units: N prunable units, capped in this order.
        sparsity: target, removed / prunable parameters (P).
        bounds: [a_min, a_max].

    Returns:
        [N] float64 retentions whose weighted mean is at most 1 - sparsity.
    """
    sizes = _sizes(units)
    wanted = _squash(scores) * (bounds.high - bounds.low + 0.1) + bounds.low
    wanted = np.rint(np.clip(wanted, 0, bounds.high) * sizes) / sizes
    budget = (1 - sparsity) * sizes.sum()
    retentions = np.full(len(units), bounds.low)
    for i in range(len(units)):
        others = (retentions * sizes).sum() - retentions[i] * sizes[i]
        retentions[i] = min(wanted[i], (budget - others) / sizes[i])
    return retentions


def water_fill(scores: Floats, units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Floats:
    """clip(a_i'' + tau, a_min, a_max) with the one tau that meets the budget (METHODS 2, ours).

    a_i'' is FF Alg. 1 line 2 with line 1 read as ``(tanh(A) + 1) / 2`` (see :func:`greedy_fill`). Unlike
    there, the sizes of the scores count, not only their order.

    Args:
        scores: [N] float64, unbounded.
        units: N prunable units.
        sparsity: target, removed / prunable parameters.
        bounds: [a_min, a_max].

    Returns:
        [N] float64 retentions, on budget up to float rounding, before DiscretizeAndCorrect.
    """
    sizes = _sizes(units)
    preference = _squash(scores) * (bounds.high - bounds.low) + bounds.low
    low, high = np.full(len(units), bounds.low), np.full(len(units), bounds.high)
    return _level(preference, sizes, low, high, (1 - sparsity) * float(sizes.sum()))


MAPPINGS: dict[str, Mapping] = {
    "water_fill": water_fill,
    "greedy_fill": greedy_fill,
    "sequential_cap": sequential_cap,
}


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
        smallest: parameters of the smallest granule.
        target: least number of parameters to remove.
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
            smallest=min(unit.params_per_granule for unit in units),
            target=least_count(sparsity, sum(unit.params for unit in units)),
            order=[int(i) for i in np.argsort(-scores, kind="stable")],
        )

    @property
    def fine(self) -> list[int]:
        """Units with the smallest granule (FFN channels), highest score first."""
        return [i for i in self.order if self.units[i].params_per_granule == self.smallest]

    def excess(self, kept: Sequence[int]) -> int:
        """Smallest granules still to remove; negative: to give back."""
        return -(-(self.target - _removed(self.units, kept)) // self.smallest)


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
    most_removed = _removed(to.units, [to.low[i] if i in fine else k for i, k in enumerate(kept)])
    least_removed = _removed(to.units, [to.high[i] if i in fine else k for i, k in enumerate(kept)])
    sign = 1 if most_removed < to.target else -1
    missing = to.target - most_removed if sign > 0 else least_removed - (to.target + to.smallest - 1)
    for i in to.order:
        if missing <= 0:
            break
        if i not in fine:
            size = to.units[i].params_per_granule
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
    sizes = _sizes(to.units)[fine] / to.smallest
    low, high = (np.array([ends[i] for i in fine]) / sizes for ends in (to.first, to.last))
    wanted = _level(retentions[fine], sizes, low, high, budget) * sizes
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
    attention granule if there is no FFN.

    Args:
        retentions: [N] float64, shares kept, from a mapping or an allocator; they need not be on budget.
        scores: [N] float64; only their order is used. Ties go to the unit listed first.
        units: N prunable units.
        sparsity: target, removed / prunable parameters.
        bounds: retention bounds, never left.
        step: grid of FFN channels, for widths that suit the hardware.
        exact: meet the budget from both sides. False: only never fall below the target, for mappings that
            may prune more than asked; the achieved value is :attr:`Allocation.sparsity`.

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
    if exact or _removed(units, kept) < to.target:
        kept = _correct_fine(_level_fine(_correct_coarse(kept, to), shares, to), to)
        surplus = _removed(units, kept) - to.target
        if surplus < 0 or (exact and surplus >= to.smallest):
            raise UnreachableSparsity(
                f"sparsity {sparsity} was asked for",
                f"Whole granules inside bounds [{bounds.low}, {bounds.high}] come to "
                f"{Allocation(tuple(units), tuple(kept)).sparsity:.6f}, since large granules leave gaps",
                "Widen search.min_keep and search.max_keep, or take that target",
            )
    return Allocation(tuple(units), tuple(kept))


def map_scores(
    scores: Floats,
    units: Sequence[Unit],
    sparsity: float,
    bounds: Bounds,
    mapping: str = "water_fill",
    step: int = 1,
) -> Allocation:
    """The whole policy mapping F (FF Alg. 1): scores -> retentions -> allocation.

    Args:
        scores: [N] float64, unbounded, one per unit (A_t).
        units: N prunable units.
        sparsity: target, removed / prunable parameters.
        bounds: retention bounds.
        mapping: a row of :data:`MAPPINGS`.
        step: grid of FFN channels.

    Returns:
        An allocation on the exact budget; with ``sequential_cap`` at or above the target.

    Raises:
        ParameterError: unknown mapping, or see :func:`to_allocation`.
        UnreachableSparsity: see :func:`to_allocation`.
        ValueError: see :func:`to_allocation`.
    """
    chosen = look_up(MAPPINGS, mapping, "search.mapping")
    check_reachable(units, sparsity, bounds)
    retentions = chosen(scores, units, sparsity, bounds)
    # SS Alg. 1 prunes more than asked by design: correcting that would make it another algorithm.
    return to_allocation(retentions, scores, units, sparsity, bounds, step, exact=mapping != "sequential_cap")


def scores_for(retentions: Floats, bounds: Bounds, limit: float = 2.0) -> Floats:
    """Scores that the squash of FF Alg. 1 lines 1-2 sends to these retentions: a search's warm start.

    ``water_fill`` of the result gives on-budget retentions back, up to what the limit cuts off: at 2.0,
    retentions within 1.8% of the range from a bound.

    Args:
        retentions: [N] float64, shares kept; values outside the bounds count as the bound.
        bounds: retention bounds.
        limit: largest score; the tanh is nearly flat beyond it and a search could hardly come back.

    Returns:
        [N] float64 in [-limit, limit].
    """
    share = (np.asarray(retentions, dtype=np.float64) - bounds.low) / (bounds.high - bounds.low)
    edge = math.tanh(limit)
    scores: Floats = np.arctanh(np.clip(2 * share - 1, -edge, edge))
    return scores
