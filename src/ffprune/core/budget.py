"""What a budget allows: retention bounds, whole granules inside them, and the sparsities they reach (METHODS 1, 2).

Budgets are compared as :attr:`Allocation.saved` reports them: the target is met when ``removed / all >= sparsity`` in
floating point, so that 0.1 of 30 weights is 3 weights and not 4. Removed of what is the units' matter: their
parameters, or what their price counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.units import Unit, removed, total_cost


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
                f"min_keep {self.low:g} and max_keep {self.high:g} were asked for",
                "Retentions are shares with 0 <= min_keep < max_keep <= 1 (max_keep is 1 where it is no parameter)",
                "Change min_keep or max_keep",
            )


def least_count(share: float, whole: int) -> int:
    """The smallest count with ``count / whole >= share``; immune to ``0.1 * 30 == 3.0000000000000004``."""
    count = math.ceil(share * whole)
    while count > 0 and (count - 1) / whole >= share:
        count -= 1
    while count / whole < share:
        count += 1
    return count


def most_count(share: float, whole: int) -> int:
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
    high = [most_count(bounds.high, unit.granules) for unit in units]
    for unit, fewest, most in zip(units, low, high, strict=True):
        if fewest > most:
            raise ParameterError(
                f"bounds [{bounds.low}, {bounds.high}] were asked for",
                f"{unit.name} has {unit.granules} granules, and no whole number of them lies within",
                "Raise search.max_keep or lower search.min_keep",
            )
    return low, high


def reachable(units: Sequence[Unit], bounds: Bounds) -> tuple[float, float]:
    """Lowest and highest sparsity that whole granules reach inside the bounds (METHODS 1 and 2).

    Each unit keeps between ``ceil(low * granules)``, at least one, and ``floor(high * granules)`` granules.

    Args:
        units: the prunable units.
        bounds: the retention bounds.

    Returns:
        (lowest, highest) sparsity: removed / all cost.

    Raises:
        ParameterError: a unit has no whole number of granules inside the bounds.
    """
    low, high = limits(units, bounds)
    total = total_cost(units)
    return removed(units, high) / total, removed(units, low) / total


def check_reachable(units: Sequence[Unit], sparsity: float, bounds: Bounds) -> None:
    """Refuse a target that no allocation inside the bounds reaches (METHODS 2).

    Args:
        units: the prunable units.
        sparsity: target, removed / all cost.
        bounds: the retention bounds.

    Raises:
        UnreachableSparsity: the target lies outside :func:`reachable`.
        ParameterError: a unit has no whole number of granules inside the bounds.
    """
    lowest, highest = reachable(units, bounds)
    if lowest <= sparsity <= highest:
        return
    # Printed ends are rounded inwards: a user who types them back must not be refused again.
    first, last = least_count(lowest, 1000) / 1000, most_count(highest, 1000) / 1000
    knob = "Raise search.max_keep" if sparsity < lowest else "Lower search.min_keep"
    raise UnreachableSparsity(
        f"sparsity {sparsity} was asked for",
        f"Bounds [{bounds.low}, {bounds.high}] reach {first:.3f} to {last:.3f}",
        f"{knob} or {'raise ' if sparsity < lowest else ''}the target",
    )
