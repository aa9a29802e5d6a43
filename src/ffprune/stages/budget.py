"""The budget that policies are made for: what it counts of every unit, and what a policy removes of each cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffprune.allocate.uniform import handmade, uniform
from ffprune.core.budget import Bounds, check_reachable
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.latency import BlockTimes
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation, Price, Unit
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.lineage import machine
from ffprune.stages.record import LATENCY
from ffprune.stages.sections import Params, Search

Facts = Mapping[str, Any]
"""What a policy file says of its budget: its name, the context of multiply-adds, the table of latencies (or empty)."""


@dataclass(frozen=True)
class Budget:
    """A budget on a model.

    Attributes:
        facts: for policy files; :meth:`on` makes the same budget of them.
        by_cost: row of :data:`BUDGETS` -> the model's units at that price; no latency where none was measured.
    """

    facts: Facts
    by_cost: Mapping[str, tuple[Unit, ...]]

    @classmethod
    def on(cls, view: ModelView, facts: Facts) -> Budget:
        """The budget that facts tell.

        Raises:
            ParameterError: unknown name; a budget of latency without a table, or with that of another model.
        """
        look_up(BUDGETS, facts["name"], "search.budget")
        prices = {name: price(view, facts) for name, price in BUDGETS.items()}
        if prices[facts["name"]] is None:
            raise ParameterError(
                "a budget of latency was asked for",
                f"{LATENCY} has no times of the units of this model",
                "Run 'dvc repro latency' with search.budget: latency",
            )
        by_cost = {
            name: tuple(replace(unit, price=price) for unit, price in zip(view.units, found, strict=True))
            for name, found in prices.items()
            if found is not None
        }
        return cls(facts, by_cost)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The model's units at the budget's price."""
        return self.by_cost[self.facts["name"]]

    def check(self, sparsity: float, bounds: Bounds) -> None:
        """Refuse a target that no policy inside the bounds reaches.

        Raises:
            UnreachableSparsity: see :func:`ffprune.core.budget.check_reachable`; a budget not of parameters is named.
        """
        try:
            check_reachable(self.units, sparsity, bounds)
        except UnreachableSparsity as refusal:
            if self.facts["name"] == "parameters":
                raise
            asked = f"{refusal.asked}, as a share of {self.facts['name']}"
            raise UnreachableSparsity(asked, refusal.possible, refusal.change) from refusal

    def removed(self, allocation: Allocation) -> dict[str, float]:
        """Share of each cost that a policy removes."""
        return {name: Allocation(units, allocation.kept).saved for name, units in self.by_cost.items()}


def facts_of(search: Search, latency: Path) -> dict[str, Any]:
    """What parameters and the stage `latency`, if it has run, say of a budget."""
    measured = artifacts.read_json(latency) if latency.exists() else {}
    return {"name": search.budget, "context": search.context, "latency": measured}


def warn_of_another_machine(facts: Facts, device: str) -> None:
    """Say so where a table was measured elsewhere: it may be meant, for a machine that does not search."""
    measured = facts["latency"].get("machine")
    if facts["name"] == "latency" and measured != machine(device):
        print(
            f"warning: the budget counts latencies of {measured}, and this is {machine(device)}; to measure here: "
            "'ffprune run latency --force'",
            file=sys.stderr,
        )


def check_budget(view: ModelView, params: Params, latency: Path) -> None:
    """Refuse sparsities that no policy of this model reaches, or not one that prune is to make; latencies, once they
    were measured.

    Args:
        view: the dense model; shapes are enough.
        params: the parameters.
        latency: the stage's file.

    Raises:
        UnreachableSparsity: search.sparsity or transfer.sparsity is out of reach, of the search or of a policy of
            prune.policies.
    """
    search, facts = params.search, facts_of(params.search, latency)
    if facts["name"] == "latency" and not facts["latency"]:
        return
    budget = Budget.on(view, facts)
    for sparsity in (search.sparsity, params.transfer.sparsity):
        budget.check(sparsity, search.bounds())
        for name in params.prune.policies:
            _check_made(name, budget, sparsity, params.prune.bounds())


def _check_made(name: str, budget: Budget, sparsity: float, bounds: Bounds) -> None:
    """Refuse a policy that the stage prune could not make, hours later."""
    try:
        if name in MADE:
            MADE[name](budget.units, sparsity, bounds)
    except UnreachableSparsity as refusal:
        raise UnreachableSparsity(
            f"{refusal.asked}, and prune.policies has {name!r}",
            refusal.possible,
            f"Lower prune.min_keep or the sparsity, or take {name!r} out of prune.policies, ridge.repairs and "
            "evaluate.methods",
        ) from refusal


def _macs(view: ModelView, facts: Facts) -> Sequence[Price]:
    return [
        unit.table(macs) if unit.fixed else macs
        for unit, macs in zip(view.units, view.granule_macs(facts["context"]), strict=True)
    ]


def _latency(view: ModelView, facts: Facts) -> Sequence[Price] | None:
    prices: dict[str, NDArray[np.int64]] = {}
    for row in facts["latency"].get("times", ()):
        times = BlockTimes(tuple(row["units"]), row["granules"], tuple(row["kept"]), tuple(row["milliseconds"]))
        prices |= dict.fromkeys(times.units, times.price)
    known = [unit.name in prices and len(prices[unit.name]) == unit.granules + 1 for unit in view.units]
    return [prices[unit.name] for unit in view.units] if all(known) else None


MADE: dict[str, Callable[[Sequence[Unit], float, Bounds], Allocation]] = {"uniform": uniform, "handmade": handmade}
"""Policies of ``prune.policies`` that follow from the units, the sparsity and the bounds alone."""

BUDGETS: dict[str, Callable[[ModelView, Facts], Sequence[Price | None] | None]] = {
    "parameters": lambda view, _: [None] * len(view.units),
    "macs": _macs,
    "latency": _latency,
}
"""Name of a budget -> price of every unit; None where it is not known."""
