"""Prunable units and allocations: a policy made exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["attention", "ffn", "weight"]
Price = int | NDArray[np.int64]
"""Of every granule alike, or int64 ``[granules + 1]``: what keeping 0, 1, ... granules costs, which never falls."""


@dataclass(frozen=True)
class Unit:
    """A prunable thing (METHODS 1): one layer's attention block or FFN (structured), or one weight matrix.

    Attributes:
        name: ``layers.3.attention``, ``layers.3.ffn`` or, for a matrix, ``layers.3.q``.
        kind: ``attention`` (granule: a key/value group with its query heads), ``ffn`` (granule: a channel) or
            ``weight`` (unstructured; granule: a single weight).
        layer: index of the decoder layer.
        granules: number of granules in the dense model.
        params_per_granule: prunable weights of one granule (biases are not counted).
        price: what budgets count of it; None: its parameters. Units that differ in price alone are equal.
        fixed: prunable weights that belong to no granule and stay: keys and values, where granules are query heads.
            They count in every share that is asked for or told. Without a price they make one of a number for every
            count of granules.
    """

    name: str
    kind: Kind
    layer: int
    granules: int
    params_per_granule: int
    price: Price | None = field(default=None, compare=False, repr=False)
    fixed: int = 0

    def __post_init__(self) -> None:
        if self.fixed and self.price is None:
            # No longer so much a granule: keeping half of them keeps more than half of the weights.
            object.__setattr__(self, "price", self.table(self.params_per_granule))

    def table(self, granule: int) -> NDArray[np.int64]:
        """The price where every granule costs the same beside the fixed weights: int64 ``[granules + 1]``."""
        return self.fixed + granule * np.arange(self.granules + 1, dtype=np.int64)

    @property
    def params(self) -> int:
        """Prunable weights of the dense unit (w_i in FF Alg. 1)."""
        return self.fixed + self.granules * self.params_per_granule

    @cached_property
    def uneven(self) -> bool:
        """Whether granules differ in price."""
        return isinstance(self.price, np.ndarray)

    @cached_property
    def granule_cost(self) -> int:
        """What budgets count of a granule; the mean, at least 1, where granules differ in price."""
        if isinstance(self.price, np.ndarray):
            return max(1, round(self.dense_cost / self.granules))
        return self.params_per_granule if self.price is None else self.price

    @cached_property
    def dense_cost(self) -> int:
        """What budgets count of the dense unit."""
        return self.cost(self.granules)

    def cost(self, kept: int) -> int:
        """What budgets count of ``kept`` granules."""
        return int(self.price[kept]) if isinstance(self.price, np.ndarray) else kept * self.granule_cost

    def costs(self, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """:meth:`cost` of several numbers of granules, int64 ``[n]``."""
        return self.price[kept] if isinstance(self.price, np.ndarray) else kept * self.granule_cost

    def affordable(self, cost: int) -> int:
        """Most granules that cost no more than this; where even none does, a number below 0."""
        if isinstance(self.price, np.ndarray):
            return int(np.searchsorted(self.price, cost, side="right")) - 1
        return cost // self.granule_cost


def removed(units: Sequence[Unit], kept: Sequence[int]) -> int:
    """Cost (without a price: prunable weights) that goes when ``kept`` granules stay in each unit."""
    return sum(u.dense_cost - u.cost(k) for u, k in zip(units, kept, strict=True))


def total_cost(units: Sequence[Unit]) -> int:
    """Cost (without a price: prunable weights) of the dense units."""
    return sum(unit.dense_cost for unit in units)


@dataclass(frozen=True)
class Allocation:
    """Granules kept in every unit, after rounding (the policy of FF Alg. 1, line 13).

    Attributes:
        units: the units, layer by layer, attention before FFN.
        kept: granules kept, one number per unit.
    """

    units: tuple[Unit, ...]
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.units) != len(self.kept):
            raise ValueError(f"{len(self.kept)} counts for {len(self.units)} units")
        for unit, kept in zip(self.units, self.kept, strict=True):
            if not 0 <= kept <= unit.granules:
                raise ValueError(f"{unit.name}: cannot keep {kept} of {unit.granules} granules")

    @classmethod
    def dense(cls, units: Sequence[Unit]) -> Allocation:
        """Everything kept."""
        return cls(tuple(units), tuple(unit.granules for unit in units))

    @property
    def retention(self) -> tuple[float, ...]:
        """Share of granules kept per unit, in [0, 1]."""
        return tuple(k / u.granules for u, k in zip(self.units, self.kept, strict=True))

    @property
    def prunable(self) -> int:
        """Prunable weights of the dense model."""
        return sum(unit.params for unit in self.units)

    @property
    def removed(self) -> int:
        """Prunable weights removed."""
        return sum((u.granules - k) * u.params_per_granule for u, k in zip(self.units, self.kept, strict=True))

    @property
    def sparsity(self) -> float:
        """Removed / prunable, by parameter count (METHODS 1)."""
        return self.removed / self.prunable

    @property
    def saved(self) -> float:
        """Share of the dense units' cost that is gone: what budgets ask for; sparsity where units have no price."""
        return removed(self.units, self.kept) / total_cost(self.units)

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per unit, for tables and artifacts."""
        return [
            {
                "unit": u.name,
                "kind": u.kind,
                "layer": u.layer,
                "granules": u.granules,
                "kept": k,
                "retention": round(k / u.granules, 6),
                "params_per_granule": u.params_per_granule,
                **({"fixed": u.fixed} if u.fixed else {}),
            }
            for u, k in zip(self.units, self.kept, strict=True)
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Allocation:
        """The inverse of :meth:`to_rows`."""
        units = tuple(
            Unit(
                r["unit"],
                r["kind"],
                int(r["layer"]),
                int(r["granules"]),
                int(r["params_per_granule"]),
                fixed=int(r.get("fixed", 0)),
            )
            for r in rows
        )
        return cls(units, tuple(int(r["kept"]) for r in rows))
