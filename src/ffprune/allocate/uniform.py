"""Policies that need no search: the same share everywhere, and what a careful hand would do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffprune.core.policy import Bounds, check_reachable, to_allocation
from ffprune.core.units import Allocation, Unit


def uniform(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Allocation:
    """The same retention in every unit, as near as granules allow; FFN channels take up the rest.

    Args:
        units: prunable units.
        sparsity: target, removed / prunable parameters.
        bounds: retention bounds.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
    """
    retentions = np.full(len(units), 1 - sparsity)
    return to_allocation(retentions, np.zeros(len(units)), units, sparsity, bounds)


def handmade(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Allocation:
    """FFN channels only, an equal share of every layer but the first and the last, which stay whole.

    Args:
        units: prunable units.
        sparsity: target, removed / prunable parameters of *all* units.
        bounds: retention bounds.

    Raises:
        UnreachableSparsity: the inner FFNs alone cannot give that much.
    """
    ends = {min(u.layer for u in units), max(u.layer for u in units)}
    inner = [i for i, u in enumerate(units) if u.kind == "ffn" and u.layer not in ends]
    inner = inner or [i for i, u in enumerate(units) if u.kind == "ffn"]
    cut = [units[i] for i in inner]
    share = sparsity * sum(u.params for u in units) / sum(u.params for u in cut)
    check_reachable(cut, share, bounds)
    found = to_allocation(np.full(len(cut), 1 - share), np.zeros(len(cut)), cut, share, bounds)
    kept = [u.granules for u in units]
    for i, k in zip(inner, found.kept, strict=True):
        kept[i] = k
    return Allocation(tuple(units), tuple(kept))
