"""Every allocator on units that carry prices: one number a granule (multiply-adds), or tables in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.agent import PRESETS, Preset
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.evolution import Evolution, eas
from ffprune.allocate.evopress import EvoPress, evopress
from ffprune.allocate.flap import global_threshold
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.guided import guided
from ffprune.allocate.multi_step import amc
from ffprune.allocate.problem import Problem
from ffprune.allocate.search import NoStore, search
from ffprune.allocate.trace_rank import trace_rank
from ffprune.allocate.uniform import handmade, uniform
from ffprune.core.budget import Bounds, reachable
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation, Unit
from tests.allocate.test_dynamic import falling, tiny
from tests.allocate.worlds import Bandit, between, layers, models
from tests.oracles import policy, uneven

Units = tuple[Unit, ...]
FEW = settings(deadline=None, max_examples=30)
BOUNDS = Bounds(0.1, 1.0)
SMALL = Preset((16,), (16,), 1e-2, 0.2, 4, 2, 0.3)


def macs(units: Sequence[Unit]) -> Units:
    """A granule of attention costs a third more than its parameters."""
    return tuple(
        replace(u, price=u.params_per_granule * 4 // 3 if u.kind == "attention" else u.params_per_granule)
        for u in units
    )


def tables(units: Sequence[Unit], seed: int = 0) -> Units:
    """Nanoseconds that rise in uneven steps above what never goes."""
    rng = np.random.default_rng(seed)
    priced = []
    for unit in units:
        steps = rng.integers(0, 2 * unit.params_per_granule, unit.granules) + (rng.random(unit.granules) < 0.7)
        floor = int(rng.integers(0, unit.params // 4 + 1))
        priced.append(replace(unit, price=np.concatenate([[floor], floor + 1 + np.cumsum(steps)])))
    return tuple(priced)


PRICES: dict[str, Callable[[Sequence[Unit]], Units]] = {"macs": macs, "tables": tables}


def on_budget(allocation: Allocation, units: Units, sparsity: float, bounds: Bounds = BOUNDS) -> bool:
    if any(unit.uneven for unit in units):
        return uneven.is_tight(units, allocation.kept, sparsity, bounds)
    sized = tuple(replace(unit, params_per_granule=unit.granule_cost) for unit in units)
    return policy.is_exact(Allocation(sized, allocation.kept), sparsity, min(unit.granule_cost for unit in units))


# --- policies that need no search ---


@FEW
@given(models(), st.floats(0, 1), st.floats(0, 0.4), st.integers(0, 10_000), st.sampled_from([1, 4, 16]))
def test_policies_that_need_no_search_are_tight_on_tables(
    units: Units, share: float, low: float, seed: int, step: int
) -> None:
    bounds, units = Bounds(low, 1.0), tables(units, seed)
    sparsity = between(units, bounds, share)
    curves = [falling(u.granules, seed + i) for i, u in enumerate(units)]
    ranks = np.random.default_rng(seed).normal(size=len(units))
    columns = [np.random.default_rng(seed + i).normal(size=u.granules) for i, u in enumerate(units)]
    makers: dict[str, Callable[[], Allocation]] = {
        "uniform": lambda: uniform(units, sparsity, bounds),
        "trace rank": lambda: trace_rank(units, ranks, sparsity, 0.15, bounds, step),
        "dynamic programming": lambda: dynamic_programming(units, curves, sparsity, bounds, step),
        "flap": lambda: global_threshold(units, columns, sparsity, bounds),
    }
    for name, make in makers.items():
        assert on_budget(make(), units, sparsity, bounds), name


@FEW
@given(models(least_layers=3), st.floats(0, 1), st.integers(0, 10_000))
def test_handmade_meets_the_budget_of_all_units_with_inner_channels_alone(
    units: Units, share: float, seed: int
) -> None:
    units = tables(units, seed)
    ends = {0, units[-1].layer}
    inner = [i for i, unit in enumerate(units) if unit.kind == "ffn" and unit.layer not in ends]
    bounds = Bounds(0.1, 1.0)
    part = [units[i] for i in inner]
    dense = [sum(u.dense_cost for u in some) for some in (units, part)]
    sparsity = share * reachable(part, bounds)[1] * dense[1] / dense[0]
    found = handmade(units, sparsity, bounds)
    assert found.saved >= sparsity
    assert all(k == u.granules for i, (u, k) in enumerate(zip(units, found.kept, strict=True)) if i not in inner)
    # Of the units that may go, none can keep a granule more.
    assert on_budget(
        Allocation(tuple(part), tuple(found.kept[i] for i in inner)), tuple(part), sparsity * dense[0] / dense[1]
    )


@FEW
@given(tiny(), st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 10_000))
def test_dynamic_programming_finds_the_least_loss_of_all_policies_on_a_table(
    units: Units, share: float, low: float, seed: int
) -> None:
    bounds, units = Bounds(low, 1.0), tables(units, seed)
    curves = [falling(u.granules, seed + i) for i, u in enumerate(units)]
    sparsity = between(units, bounds, share)
    found = dynamic_programming(units, curves, sparsity, bounds, 1)
    loss = sum(float(curve[k]) for curve, k in zip(curves, found.kept, strict=True))
    assert loss == pytest.approx(uneven.least_loss(units, curves, sparsity, bounds), rel=1e-9, abs=1e-12)


def test_dynamic_programming_removes_what_is_dear_for_its_loss() -> None:
    """Attention ten times as dear by the table as by parameters: channels stay."""
    plain = layers(3, heads=8, head=15)
    dear = tuple(
        replace(u, price=np.arange(u.granules + 1) * u.params_per_granule * (10 if u.kind == "attention" else 1))
        for u in plain
    )
    curves = [np.linspace(1, 0, u.granules + 1) ** 2 for u in plain]
    kept = {name: dynamic_programming(u, curves, 0.3, BOUNDS, 1) for name, u in (("plain", plain), ("dear", dear))}
    assert sum(kept["dear"].kept[1::2]) > sum(kept["plain"].kept[1::2])


# --- searches ---


def made(units: Units, sparsity: float) -> tuple[Problem, Bandit]:
    bandit = Bandit(np.linspace(1, 3, len(units)).tolist())
    starts = {"uniform": uniform(units, sparsity, BOUNDS)}
    return Problem(units, sparsity, BOUNDS, "water_fill", 4, bandit, starts), bandit


def run_guided(problem: Problem) -> Allocation:
    curves = [np.linspace(1, 0, unit.granules + 1) ** 2 for unit in problem.units]
    guide = Guidance(0.1, 0.4, imagined=16, batch=4, proposals=1)
    found = guided(problem, curves, guide, SMALL, _FLAT, 8, 1, 0, NoStore(), _quiet)
    for sparsity, allocation in found.front.items():
        assert allocation.saved >= sparsity - 1e-6
    return found.best.allocation


def _quiet(_: Episode) -> None:
    """Nothing."""


_FLAT = Schedule(1.0, 1.0, 0.0)
SEARCHES: dict[str, Callable[[Problem], Allocation]] = {
    "guided": run_guided,
    "ppo": lambda p: search(p, SMALL, _FLAT, 8, 1, 0, NoStore(), _quiet).best.allocation,
    "ppo with a curriculum": lambda p: (
        search(p, SMALL, Schedule.scaled(0.6, 0.01, 500, episodes=8), 8, 1, 0, NoStore(), _quiet).best.allocation
    ),
    "eas": lambda p: eas(p, Evolution(6, 2, 3, 3), 12, 0, lambda _: None).best.allocation,
    "evopress": lambda p: evopress(p, EvoPress(4, (2, 1), (0.5, 1.0), 0.5), 14, 0, lambda _: None).best.allocation,
    "amc": lambda p: amc(p, replace(PRESETS["sparsitysolver"], episodes_per_update=4), 4, 1, 0, _quiet).best.allocation,
}


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("name", SEARCHES)
def test_every_trial_of_every_search_is_on_the_budget(name: str, price: str) -> None:
    units = PRICES[price](layers(3))
    problem, bandit = made(units, 0.25)
    best = SEARCHES[name](problem)
    assert on_budget(best, units, 0.25)
    assert len(bandit.calls) > 5
    if "curriculum" not in name:
        assert all(on_budget(allocation, units, 0.25) for allocation, _ in bandit.calls)


def test_a_target_that_a_table_does_not_reach_is_refused() -> None:
    units = tables(layers(2))
    highest = reachable(units, BOUNDS)[1]
    curves = [falling(u.granules, 0) for u in units]
    with pytest.raises(UnreachableSparsity, match="reach 0"):
        dynamic_programming(units, curves, highest + 0.01, BOUNDS, 1)
