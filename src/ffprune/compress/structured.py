"""Structured pruning: rank once, then cut any allocation as prefixes of the ranked granules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.compress.levels import Levels
from ffprune.core.units import Allocation
from ffprune.models.surgery import UnitWeights, read_unit, set_unit
from ffprune.models.view import ModelView


@dataclass
class Plan:
    """Everything needed to set any allocation on one model (DESIGN: ``apply(plan, allocation)``).

    Attributes:
        view: the model that allocations are set on.
        ordered: per unit, its dense weights with granules in the order of importance.
        levels: the repaired last maps; None when the plan does not repair.
    """

    view: ModelView
    ordered: list[UnitWeights]
    levels: Levels | None

    def apply(self, allocation: Allocation) -> None:
        """Make the model compute with this allocation, physically smaller; weights are views, not copies."""
        for index, kept in enumerate(allocation.kept):
            dense = self.ordered[index]
            weights = dense.prefix(kept)
            if self.levels is not None and kept < dense.granules:
                weights = weights.replace_last(self.levels.at(index, kept, dense.weight[dense.last_role]))
            set_unit(self.view, index, weights)


def prepare(view: ModelView, orders: Sequence[Tensor], levels: Levels | None, dtype: torch.dtype) -> Plan:
    """Order every unit's granules once.

    Args:
        view: the dense model; allocations are set on it. It is converted to ``dtype`` here, after ``levels`` has
            taken what it needs of it.
        orders: per unit, int64 ``[granules]``, most important first.
        levels: repairs, by the same orders; None for cuts without repair.
        dtype: of the model that allocations are tried on.
    """
    view.model.to(dtype=dtype)  # type: ignore[call-arg]
    ordered = [read_unit(view, index).select(order) for index, order in enumerate(orders)]
    return Plan(view, ordered, levels)
