"""Units whose granules differ in price, such as measured milliseconds: what they cost together, at any retention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.units import Unit

Floats = NDArray[np.float64]

_HALVINGS = 16
"""Of a sparsity; what is left is less than a granule, which rounding settles."""


class CostTable:
    """The prices of N units side by side, so that a policy's cost is one look-up.

    Args:
        units: with prices or without.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.granules = np.array([unit.granules for unit in units])
        self._rows = np.arange(len(units))
        # One column more than any unit has, so that the next granule of a full unit can be read.
        self._table = np.zeros((len(units), int(self.granules.max()) + 2), dtype=np.int64)
        for row, unit in zip(self._table, units, strict=True):
            even = np.arange(unit.granules + 1) * unit.granule_cost
            row[: unit.granules + 1] = unit.price if isinstance(unit.price, np.ndarray) else even
            row[unit.granules + 1 :] = unit.dense_cost

    def of(self, kept: NDArray[np.int64]) -> int:
        """Cost of whole granules, int64 ``[N]``, together."""
        return int(self._table[self._rows, kept].sum())

    def at(self, retentions: Floats) -> Floats:
        """Cost of retentions in [0, 1], ``[..., N]`` -> ``[...]``; between two whole granules, a straight line."""
        wanted = retentions * self.granules
        whole = np.floor(wanted).astype(np.int64)
        low, high = self._table[self._rows, whole], self._table[self._rows, whole + 1]
        cost: Floats = (low + (wanted - whole) * (high - low)).sum(-1)
        return cost


def on_budget(mapping: Callable[[Floats], Floats], units: Sequence[Unit], sparsity: float | Floats) -> Floats:
    """What a mapping answers where its retentions really cost the budget.

    A mapping takes the granules of a unit for equally dear. Asked for more or less than the target, it is right on the
    whole; the higher the sparsity that it is asked for, the less its retentions cost, which makes bisection safe.

    Args:
        mapping: sparsities ``[...]``, by the cost of dense units -> float64 ``[..., N]`` retentions.
        units: N units.
        sparsity: target, removed / all cost; or several, ``[...]``.

    Returns:
        [..., N] float64 retentions, at or below the budget, as near as the mapping allows.
    """
    table = CostTable(units)
    budget = (1 - np.asarray(sparsity)) * table.of(table.granules)
    below, above = np.zeros(budget.shape), np.ones(budget.shape)
    for _ in range(_HALVINGS):
        asked = (below + above) / 2
        dear = table.at(mapping(asked)) > budget
        below, above = np.where(dear, asked, below), np.where(dear, above, asked)
    return mapping(above)
