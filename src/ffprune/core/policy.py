"""From unbounded scores to retentions: the policy mapping F of FF Alg. 1, SS Alg. 1 and our own.

A mapping of :data:`MAPPINGS` turns scores into retentions in float, :func:`ffprune.core.rounding.to_allocation` makes
them whole granules on an exact budget; :func:`map_scores` is both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ffprune.core.budget import Bounds, check_reachable
from ffprune.core.rounding import Floats, level, sizes_of, to_allocation
from ffprune.core.tables import look_up
from ffprune.core.uneven import on_budget
from ffprune.core.units import Allocation, Unit

Mapping = Callable[[Floats, Sequence[Unit], float | Floats, Bounds], Floats]
"""(scores [..., N] float64, units, sparsity [...], bounds) -> retentions [..., N] float64: one policy or many."""


def _squash(scores: Floats) -> Floats:
    """(tanh(A) + 1) / 2, the meaning of FF Alg. 1 line 1 (see :func:`greedy_fill`)."""
    return (np.tanh(scores) + 1) / 2


def greedy_fill(scores: Floats, units: Sequence[Unit], sparsity: float | Floats, bounds: Bounds) -> Floats:
    """FF Alg. 1, lines 1-12: every unit starts at a_min, the budget fills units by falling score.

    Line 1 prints ``clip(tanh(A + 1) / 2, 0, 1)``, which cannot exceed 0.5 and sends half of all actions to
    nearly nothing; ``(tanh(A) + 1) / 2`` is what is meant (METHODS 2). Only the order of the scores matters,
    and all units but one end at a_min or a_max. Ties go to the unit listed first.

    Args:
        scores: [..., N] float64, unbounded (A_t).
        units: N prunable units (w_i is ``unit.dense_cost``).
        sparsity: [...] target, removed / all cost (1 - P).
        bounds: [a_min, a_max].

    Returns:
        [..., N] float64 retentions, on budget up to float rounding, before DiscretizeAndCorrect.
    """
    sizes = sizes_of(units)
    preference = _squash(scores) * (bounds.high - bounds.low) + bounds.low
    order = np.argsort(-preference, axis=-1, kind="stable")
    remaining = (1 - np.asarray(sparsity)) * sizes.sum() - (np.full(len(units), bounds.low) * sizes).sum()
    falling, given = sizes[order], np.zeros(scores.shape)
    for place in range(len(units)):
        room = (bounds.high - bounds.low) * falling[..., place]
        given[..., place] = np.minimum(remaining, room).clip(0)
        remaining = remaining - given[..., place]
    retentions = np.empty(scores.shape)
    np.put_along_axis(retentions, order, bounds.low + given / falling, -1)
    return retentions


def sequential_cap(scores: Floats, units: Sequence[Unit], sparsity: float | Floats, bounds: Bounds) -> Floats:
    """SS Alg. 1: scale, clip, round to whole parameters, then cap each unit by what earlier ones left.

    The cap only lowers retentions, so low scores prune **more** than asked: read the achieved sparsity off
    the allocation. Its line 1 is misprinted as FF's is, and read as ``(tanh(A) + 1) / 2`` (METHODS 2).

    Args:
        scores: [..., N] float64, unbounded (A_t).
        units: N prunable units, capped in this order.
        sparsity: [...] target, removed / all cost (P).
        bounds: [a_min, a_max].

    Returns:
        [..., N] float64 retentions whose weighted mean is at most 1 - sparsity.
    """
    sizes = sizes_of(units)
    wanted = _squash(scores) * (bounds.high - bounds.low + 0.1) + bounds.low
    wanted = np.rint(np.clip(wanted, 0, bounds.high) * sizes) / sizes
    budget = (1 - np.asarray(sparsity)) * sizes.sum()
    retentions = np.full(scores.shape, bounds.low)
    for i in range(len(units)):
        others = (retentions * sizes).sum(-1) - retentions[..., i] * sizes[i]
        retentions[..., i] = np.minimum(wanted[..., i], (budget - others) / sizes[i])
    return retentions


def water_fill(scores: Floats, units: Sequence[Unit], sparsity: float | Floats, bounds: Bounds) -> Floats:
    """clip(a_i'' + tau, a_min, a_max) with the one tau that meets the budget (METHODS 2, ours).

    a_i'' is FF Alg. 1 line 2 with line 1 read as ``(tanh(A) + 1) / 2`` (see :func:`greedy_fill`). Unlike
    there, the sizes of the scores count, not only their order.

    Args:
        scores: [..., N] float64, unbounded.
        units: N prunable units.
        sparsity: [...] target, removed / all cost.
        bounds: [a_min, a_max].

    Returns:
        [..., N] float64 retentions, on budget up to float rounding, before DiscretizeAndCorrect.
    """
    sizes = sizes_of(units)
    preference = _squash(scores) * (bounds.high - bounds.low) + bounds.low
    low, high = np.full(len(units), bounds.low), np.full(len(units), bounds.high)
    return level(preference, sizes, low, high, (1 - np.asarray(sparsity)) * float(sizes.sum()))


MAPPINGS: dict[str, Mapping] = {
    "water_fill": water_fill,
    "greedy_fill": greedy_fill,
    "sequential_cap": sequential_cap,
}


def fill(
    scores: Floats, units: Sequence[Unit], sparsity: float | Floats, bounds: Bounds, mapping: str = "water_fill"
) -> Floats:
    """The policy mapping F before its rounding: what scores make of a budget, counted in granules or in their prices.

    Args:
        scores: [..., N] float64, unbounded, one per unit (A_t).
        units: N prunable units.
        sparsity: [...] target, removed / all cost.
        bounds: retention bounds.
        mapping: a row of :data:`MAPPINGS`.

    Returns:
        [..., N] float64 retentions.

    Raises:
        ParameterError: unknown mapping.
    """
    chosen = look_up(MAPPINGS, mapping, "search.mapping")
    if any(unit.uneven for unit in units):
        return on_budget(lambda asked: chosen(scores, units, asked, bounds), units, sparsity)
    return chosen(scores, units, sparsity, bounds)


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
        sparsity: target, removed / all cost.
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
    check_reachable(units, sparsity, bounds)
    retentions = fill(scores, units, sparsity, bounds, mapping)
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
