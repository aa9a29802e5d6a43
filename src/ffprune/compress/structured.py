"""Structured pruning: rank once, then cut any allocation as prefixes of the ranked granules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ffprune.core.ridge import PrefixRidge
from ffprune.core.units import Allocation
from ffprune.models.surgery import UnitWeights, read_unit, set_unit
from ffprune.models.view import ModelView, granule_indices


@dataclass
class Plan:
    """Everything needed to set any allocation on one model (DESIGN: ``apply(plan, allocation)``).

    Attributes:
        view: the model that allocations are set on.
        ordered: per unit, its dense weights with granules in the order of importance.
        ridges: per unit, the repair at every prefix; None when the plan does not repair.
        cache_bytes: repaired maps kept for reuse, at most; the least recently used go first.
    """

    view: ModelView
    ordered: list[UnitWeights]
    ridges: list[PrefixRidge] | None
    cache_bytes: int
    _cache: OrderedDict[tuple[int, int], Tensor] = field(default_factory=OrderedDict)
    _held: int = 0

    def apply(self, allocation: Allocation) -> None:
        """Make the model compute with this allocation, physically smaller; nothing but repaired maps is copied."""
        for index, kept in enumerate(allocation.kept):
            weights = self.ordered[index].prefix(kept)
            if self.ridges is not None and kept < self.ordered[index].granules:
                weights = weights.replace_last(self._repaired(index, kept))
            set_unit(self.view, index, weights)

    def _repaired(self, index: int, kept: int) -> Tensor:
        assert self.ridges is not None
        key = (index, kept)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        unit = self.ordered[index]
        dense = unit.weight[unit.last_role]
        found = self.ridges[index].at(kept * unit.width[unit.last_role]).to(dense.device, dense.dtype)
        self._cache[key] = found
        self._held += found.nbytes
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return found


def prepare(
    view: ModelView,
    orders: Sequence[Tensor],
    grams: Sequence[Tensor] | None,
    damping: float,
    dtype: torch.dtype,
    cache_bytes: int = 1 << 30,
) -> Plan:
    """Order every unit's granules once and, with Grams, factorise its repair once (METHODS 7).

    The view's model must hold its dense weights in full precision; it is converted to ``dtype`` here, after the
    repairs have been factorised.

    Args:
        view: the dense model; allocations are set on it.
        orders: per unit, int64 ``[granules]``, most important first.
        grams: per unit, float ``[n, n]``, X^T X of the last linear map's input; None for cuts without repair.
        damping: lambda relative to mean diag of the Gram.
        dtype: of the model that allocations are tried on.
        cache_bytes: how much of repaired maps to keep.
    """
    ridges = None
    if grams is not None:
        ridges = []
        for index, (order, gram) in enumerate(zip(orders, grams, strict=True)):
            parts = view.unit_linears(index)
            columns = granule_indices(order, parts.width[parts.last_role])
            ridges.append(PrefixRidge.prepare(parts.last.weight.detach().float().cpu(), gram, columns, damping))
    view.model.to(dtype=dtype)  # type: ignore[call-arg]
    ordered = [read_unit(view, index).select(order) for index, order in enumerate(orders)]
    return Plan(view, ordered, ridges, cache_bytes)
