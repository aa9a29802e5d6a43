"""Budgets of prices: one number a granule, or a table in which granules differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ffprune.core.budget import Bounds, check_reachable, reachable
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.policy import MAPPINGS, fill, map_scores
from ffprune.core.rounding import to_allocation
from ffprune.core.uneven import CostTable, on_budget
from ffprune.core.units import Allocation, Unit
from tests.core.test_policy import BOUNDS, LLAMA, draw_scores, inside, layers, models, possible, target_between
from tests.oracles import policy, uneven

FEW = settings(deadline=None, max_examples=40)


def tabled(units: list[Unit], seed: int, free: float = 0.3) -> list[Unit]:
    """Units with tables of random increments, some of them 0, and a part that never goes."""
    rng = np.random.default_rng(seed)
    priced = []
    for unit in units:
        steps = rng.integers(1, 1000, unit.granules) * (rng.random(unit.granules) >= free)
        steps[-1] += 1
        price = np.concatenate([[0], np.cumsum(steps)]) + int(rng.integers(0, 500))
        priced.append(replace(unit, price=price))
    return priced


SEEDS = st.integers(0, 10_000)


# --- units ---


def test_a_unit_without_a_price_costs_its_parameters() -> None:
    unit = Unit("layers.0.ffn", "ffn", 0, 10, 3)
    assert (unit.dense_cost, unit.granule_cost, unit.cost(4), unit.uneven) == (30, 3, 12, False)
    assert [unit.affordable(cost) for cost in (-1, 0, 2, 3, 11, 100)] == [-1, 0, 0, 1, 3, 33]


def test_prices_of_one_number_and_of_a_table() -> None:
    unit = Unit("layers.0.ffn", "ffn", 0, 4, 3)
    flat, table = replace(unit, price=7), replace(unit, price=np.array([5, 5, 8, 8, 12]))
    assert (flat.dense_cost, flat.granule_cost, flat.cost(3), flat.uneven) == (28, 7, 21, False)
    assert (table.dense_cost, table.granule_cost, table.cost(3), table.uneven) == (12, 3, 8, True)
    assert [table.affordable(cost) for cost in (4, 5, 7, 8, 11, 12, 99)] == [-1, 1, 1, 3, 3, 4, 4]
    assert unit == flat == table
    assert Allocation((table,), (3,)).saved == pytest.approx(4 / 12)
    assert Allocation((table,), (3,)).sparsity == 0.25


# --- what is reached ---


def test_what_never_goes_is_out_of_reach() -> None:
    unit = Unit("layers.0.ffn", "ffn", 0, 4, 1, price=np.array([50, 50, 60, 80, 100]))
    assert reachable([unit], Bounds(0, 1)) == (0.0, 0.5)
    with pytest.raises(UnreachableSparsity, match=r"reach 0\.000 to 0\.400"):
        check_reachable([unit], 0.5, Bounds(0.5, 1))


@FEW
@given(models(), BOUNDS, SEEDS, st.integers(1, 7), st.sampled_from(["water_fill", "greedy_fill"]))
def test_the_upper_end_of_the_reach_is_reached(
    units: list[Unit], bounds: Bounds, seed: int, step: int, mapping: str
) -> None:
    assume(possible(units, bounds))
    units = tabled(units, seed)
    highest = reachable(units, bounds)[1]
    found = map_scores(np.linspace(1, -1, len(units)), units, highest, bounds, mapping, step)
    assert found.saved == highest


# --- the table of costs ---


@FEW
@given(st.data(), models(), SEEDS)
def test_costs_are_those_of_the_twin(data: st.DataObject, units: list[Unit], seed: int) -> None:
    units = tabled(units, seed)
    units[0] = replace(units[0], price=None)
    kept = [data.draw(st.integers(0, unit.granules)) for unit in units]
    table = CostTable(units)
    whole = sum(uneven.cost(u, k) for u, k in zip(units, kept, strict=True))
    assert table.of(np.array(kept)) == whole
    shares = np.array(kept) / table.granules
    assert table.at(shares) == pytest.approx(whole, rel=1e-9)
    half = [min(k + 0.5, u.granules) for u, k in zip(units, kept, strict=True)]
    expected = sum(
        (uneven.cost(u, int(np.floor(h))) + uneven.cost(u, int(np.ceil(h)))) / 2
        for u, h in zip(units, half, strict=True)
    )
    assert table.at(np.array(half) / table.granules) == pytest.approx(expected, rel=1e-6)


@FEW
@given(st.data(), SEEDS, st.floats(0.05, 0.95), st.sampled_from(["water_fill", "greedy_fill"]))
def test_a_mapping_is_asked_at_the_sparsity_that_costs_the_budget(
    data: st.DataObject, seed: int, share: float, mapping: str
) -> None:
    bounds = Bounds(0.1, 1)
    units = tabled(LLAMA, seed, free=0)
    table, scores = CostTable(units), draw_scores(data, len(units))
    dense = table.of(table.granules)
    ends = [table.at(np.full(len(units), end)) for end in (bounds.low, bounds.high)]
    sparsity = 1 - (ends[0] + share * (ends[1] - ends[0])) / dense
    found = on_budget(lambda asked: MAPPINGS[mapping](scores, units, asked, bounds), units, sparsity)
    assert table.at(found) == pytest.approx((1 - sparsity) * dense, rel=1e-3)


@pytest.mark.parametrize("mapping", sorted(MAPPINGS))
@pytest.mark.parametrize("priced", [False, True])
def test_many_policies_at_once_are_those_of_each(mapping: str, priced: bool) -> None:
    rng, bounds = np.random.default_rng(0), Bounds(0.1, 0.95)
    units = tabled(LLAMA, 3) if priced else LLAMA
    scores, sparsities = rng.normal(size=(5, len(units))), rng.uniform(0.2, 0.6, 5)
    together = fill(scores, units, sparsities, bounds, mapping)
    single = [
        fill(row, units, float(sparsity), bounds, mapping) for row, sparsity in zip(scores, sparsities, strict=True)
    ]
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-12)
    assert np.ptp(together) > 0.1


# --- exact budget ---


@FEW
@given(st.data(), models(), BOUNDS, SEEDS, st.floats(0, 1), st.integers(1, 9), st.sampled_from(sorted(MAPPINGS)))
def test_no_unit_can_keep_a_granule_more(
    data: st.DataObject, units: list[Unit], bounds: Bounds, seed: int, share: float, step: int, mapping: str
) -> None:
    assume(possible(units, bounds))
    units = tabled(units, seed)
    sparsity = target_between(units, bounds, share)
    found = map_scores(draw_scores(data, len(units)), units, sparsity, bounds, mapping, step)
    assert inside(found, bounds)
    assert found.saved >= sparsity
    assert mapping == "sequential_cap" or uneven.is_tight(units, found.kept, sparsity, bounds)


@FEW
@given(st.data(), models(), BOUNDS, SEEDS, st.floats(0, 1), st.integers(1, 9), st.floats(0, 1))
def test_any_retentions_end_on_a_tight_budget(
    data: st.DataObject, units: list[Unit], bounds: Bounds, seed: int, share: float, step: int, level: float
) -> None:
    assume(possible(units, bounds))
    units = tabled(units, seed)
    sparsity = target_between(units, bounds, share)
    retentions = np.full(len(units), level)
    found = to_allocation(retentions, draw_scores(data, len(units)), units, sparsity, bounds, step)
    assert uneven.is_tight(units, found.kept, sparsity, bounds)


@FEW
@given(st.data(), models(), BOUNDS, SEEDS, st.floats(0, 1))
def test_a_tight_allocation_is_left_alone(
    data: st.DataObject, units: list[Unit], bounds: Bounds, seed: int, share: float
) -> None:
    assume(possible(units, bounds))
    units = tabled(units, seed)
    scores = draw_scores(data, len(units))
    first = map_scores(scores, units, target_between(units, bounds, share), bounds)
    again = to_allocation(np.array(first.retention), scores, units, first.saved, bounds)
    assert again.kept == first.kept


@FEW
@given(st.data(), st.floats(0, 1), SEEDS)
def test_units_stay_on_the_grid_as_far_as_the_budget_allows(data: st.DataObject, share: float, seed: int) -> None:
    # Granules cost 900 to 999: one unit takes what is less than a step, which may leave another a single granule.
    bounds, rng = Bounds(0.25, 1), np.random.default_rng(seed)
    units = [replace(u, price=np.cumsum([0, *rng.integers(900, 1000, u.granules)])) for u in LLAMA]
    found = map_scores(draw_scores(data, len(units)), units, target_between(units, bounds, share), bounds, step=64)
    off = [k for unit, k in zip(units, found.kept, strict=True) if unit.kind == "ffn" and k % 64]
    assert len(off) <= 2


def test_granules_that_cost_nothing_are_kept() -> None:
    price = np.array([0, 10, 10, 10, 20, 20, 30])
    units = [Unit(f"layers.{i}.ffn", "ffn", i, 6, 1, price=price) for i in range(2)]
    assert to_allocation(np.full(2, 0.5), np.zeros(2), units, 1 / 3, Bounds(0, 1)).kept == (5, 5)


def test_a_table_of_parameters_prunes_as_parameters_do() -> None:
    bounds, scores = Bounds(0.2, 1), np.random.default_rng(1).normal(size=len(LLAMA))
    tables = [replace(u, price=np.arange(u.granules + 1) * u.params_per_granule) for u in LLAMA]
    for mapping in ("water_fill", "greedy_fill"):
        plain = map_scores(scores, LLAMA, 0.3, bounds, mapping, step=32)
        table = map_scores(scores, tables, 0.3, bounds, mapping, step=32)
        np.testing.assert_allclose(table.retention, plain.retention, atol=1 / 3 + 1e-9)
        assert policy.is_exact(table, 0.3, 1728)


# --- one number a granule ---


@FEW
@given(st.data(), models(), BOUNDS, st.floats(0, 1), st.integers(1, 9), st.integers(0, 400))
@pytest.mark.parametrize("mapping", sorted(MAPPINGS))
def test_prices_of_granules_are_to_budgets_what_parameters_are(
    mapping: str, data: st.DataObject, units: list[Unit], bounds: Bounds, share: float, step: int, context: int
) -> None:
    assume(possible(units, bounds))
    sizes = [u.params_per_granule + (context if u.kind == "attention" else 0) for u in units]
    priced = [replace(u, price=size) for u, size in zip(units, sizes, strict=True)]
    sized = [replace(u, params_per_granule=size) for u, size in zip(units, sizes, strict=True)]
    sparsity, scores = target_between(priced, bounds, share), draw_scores(data, len(units))
    try:
        expected = map_scores(scores, sized, sparsity, bounds, mapping, step)
    except UnreachableSparsity:
        with pytest.raises(UnreachableSparsity):
            map_scores(scores, priced, sparsity, bounds, mapping, step)
        return
    found = map_scores(scores, priced, sparsity, bounds, mapping, step)
    assert found.kept == expected.kept
    assert found.saved == expected.sparsity >= sparsity
    assert mapping == "sequential_cap" or policy.is_exact(expected, sparsity, min(sizes))


def test_sparsity_stays_that_of_parameters() -> None:
    units = [
        replace(u, price=u.params_per_granule * (3 if u.kind == "attention" else 1)) for u in layers(2, 4, 50, 10, 5)
    ]
    found = Allocation(tuple(units), (2, 10, 4, 10))
    assert found.sparsity == 100 / 500
    assert found.saved == 300 / 1300
