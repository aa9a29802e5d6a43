"""Policies that need no search: the same share everywhere, and what a careful hand would do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffprune.core.budget import Bounds, least_count, reachable
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit, total_cost


def uniform(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> Allocation:
    """The same retention in every unit, as near as granules allow; FFN channels take up the rest.

    Args:
        units: prunable units.
        sparsity: target, removed / all cost.
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
        sparsity: target, removed / all cost of *all* units.
        bounds: retention bounds.

    Raises:
        UnreachableSparsity: the inner FFNs alone cannot give that much.
    """
    ends = {min(u.layer for u in units), max(u.layer for u in units)}
    inner = [i for i, u in enumerate(units) if u.kind == "ffn" and u.layer not in ends]
    inner = inner or [i for i, u in enumerate(units) if u.kind == "ffn"]
    cut = [units[i] for i in inner]
    whole, part = total_cost(units), total_cost(cut)
    # A whole number, then their share: a product of floats would miss the exact budget by a channel now and then.
    # Measured times can make channels cost nothing; then nothing of a cost goes with them.
    share = least_count(sparsity, whole) / part if part else np.inf
    lowest, highest = reachable(cut, bounds) if part else (0.0, 0.0)
    if not lowest <= share <= highest:
        raise UnreachableSparsity(
            f"sparsity {sparsity} was asked for from the inner FFN channels alone",
            f"Inside bounds [{bounds.low}, {bounds.high}] they give {lowest * part / whole:.3f} to "
            f"{highest * part / whole:.3f} of all units' cost",
            "Lower the least retention or the target, or leave out the handmade policy",
        )
    found = to_allocation(np.full(len(cut), 1 - share), np.zeros(len(cut)), cut, share, bounds)
    kept = [u.granules for u in units]
    for i, k in zip(inner, found.kept, strict=True):
        kept[i] = k
    return Allocation(tuple(units), tuple(kept))
