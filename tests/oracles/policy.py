"""Twins of ffprune.core.policy: loops over Python floats, and plain enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ffprune.core.budget import Bounds
from ffprune.core.units import Allocation, Unit


def actions(scores: Sequence[float], bounds: Bounds) -> list[float]:
    """FF Alg. 1, lines 1-2, line 1 as METHODS 2 reads it."""
    return [(math.tanh(a) + 1) / 2 * (bounds.high - bounds.low) + bounds.low for a in scores]


def greedy_fill(scores: Sequence[float], units: Sequence[Unit], sparsity: float, bounds: Bounds) -> list[float]:
    """FF Alg. 1, lines 1-12, transcribed line by line."""
    P = 1 - sparsity
    w = [unit.params for unit in units]
    A2 = actions(scores, bounds)
    A = [bounds.low for _ in units]
    B_rem = P * sum(w) - sum(a * wi for a, wi in zip(A, w, strict=True))
    order = sorted(range(len(units)), key=lambda i: (-A2[i], i))
    for i in order:
        delta_max = (bounds.high - A[i]) * w[i]
        delta = min(B_rem, delta_max)
        A[i] = A[i] + delta / w[i]
        B_rem = B_rem - delta
        if B_rem <= 0:
            break
    return A


def sequential_cap(scores: Sequence[float], units: Sequence[Unit], sparsity: float, bounds: Bounds) -> list[float]:
    """SS Alg. 1, transcribed line by line."""
    w = [unit.params for unit in units]
    a = [(math.tanh(x) + 1) / 2 for x in scores]
    a = [x * (bounds.high - bounds.low + 0.1) + bounds.low for x in a]
    a = [min(max(x, 0), bounds.high) for x in a]
    a = [round(x * wi) / wi for x, wi in zip(a, w, strict=True)]
    capped: list[float] = []
    for i in range(len(units)):
        w_other = sum(capped[k] * w[k] for k in range(i)) + sum(bounds.low * w[k] for k in range(i + 1, len(w)))
        capped.append(min(a[i], ((1 - sparsity) * sum(w) - w_other) / w[i]))
    return capped


def water_fill(scores: Sequence[float], units: Sequence[Unit], sparsity: float, bounds: Bounds) -> list[float]:
    """The level tau by scanning every kink of the kept parameters, and solving the one linear piece."""
    w = [unit.params for unit in units]
    a = actions(scores, bounds)

    def filled(tau: float) -> list[float]:
        return [min(max(x + tau, bounds.low), bounds.high) for x in a]

    def kept(tau: float) -> float:
        return math.fsum(r * wi for r, wi in zip(filled(tau), w, strict=True))

    budget = (1 - sparsity) * sum(w)
    kinks = sorted([bounds.low - x for x in a] + [bounds.high - x for x in a])
    if kept(kinks[0]) >= budget:
        return filled(kinks[0])
    for left, right in itertools.pairwise(kinks):
        if kept(left) <= budget <= kept(right) and kept(right) > kept(left):
            share = (budget - kept(left)) / (kept(right) - kept(left))
            return filled(left + share * (right - left))
    return filled(kinks[-1])


def granule_limits(unit: Unit, bounds: Bounds) -> list[int]:
    """Every count of granules inside the bounds, by trying all of them."""
    return [k for k in range(1, unit.granules + 1) if bounds.low <= k / unit.granules <= bounds.high]


def exact_exists(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> bool:
    """Whether any allocation at all is on the exact budget of METHODS 1."""
    smallest = min(unit.params_per_granule for unit in units)
    return any(
        is_exact(Allocation(tuple(units), kept), sparsity, smallest)
        for kept in itertools.product(*(granule_limits(unit, bounds) for unit in units))
    )


def is_exact(allocation: Allocation, sparsity: float, smallest: int) -> bool:
    """At or above the target, and below it with one of the smallest granules fewer removed."""
    return allocation.sparsity >= sparsity and (allocation.removed - smallest) / allocation.prunable < sparsity
