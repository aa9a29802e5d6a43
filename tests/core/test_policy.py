from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ffprune.core.budget import Bounds, check_reachable, reachable
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.policy import MAPPINGS, map_scores, scores_for
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit
from tests.oracles import policy as oracle


def layers(count: int, heads: int, head: int, channels: int, channel: int) -> list[Unit]:
    return [
        unit
        for i in range(count)
        for unit in (
            Unit(f"layers.{i}.attention", "attention", i, heads, head),
            Unit(f"layers.{i}.ffn", "ffn", i, channels, channel),
        )
    ]


# The shape of a small Llama: an attention granule is worth about 170 channels.
LLAMA = layers(6, 3, 294_912, 1536, 1728)
# Wide enough bounds for every unit to hold at least one whole granule.
BOUNDS = st.tuples(st.floats(0, 0.5), st.one_of(st.just(1.0), st.floats(0.7, 1))).map(lambda b: Bounds(*b))
FEW = settings(deadline=None, max_examples=60)


@st.composite
def models(draw: st.DrawFn, most_layers: int = 4, most_channels: int = 40) -> list[Unit]:
    """Layers of one model: all attention granules are of one size, and so are all channels."""
    channel = draw(st.integers(1, 12))
    head = channel * draw(st.integers(1, 15)) + draw(st.integers(0, 11))
    units = []
    for i in range(draw(st.integers(1, most_layers))):
        units.append(Unit(f"layers.{i}.attention", "attention", i, draw(st.integers(1, 6)), head))
        units.append(Unit(f"layers.{i}.ffn", "ffn", i, draw(st.integers(1, most_channels)), channel))
    return units


def possible(units: list[Unit], bounds: Bounds) -> bool:
    return all(oracle.granule_limits(unit, bounds) for unit in units)


def target_between(units: list[Unit], bounds: Bounds, share: float) -> float:
    lowest, highest = reachable(units, bounds)
    return min(lowest + share * (highest - lowest), highest)


def draw_scores(data: st.DataObject, count: int) -> np.ndarray:
    # Hundredths: scores an ulp apart may tie after the squash, and ties are another test.
    hundredths = data.draw(st.lists(st.integers(-300, 300), min_size=count, max_size=count))
    return np.array(hundredths) / 100


def inside(allocation: Allocation, bounds: Bounds) -> bool:
    return all(k >= 1 for k in allocation.kept) and all(
        bounds.low <= r <= bounds.high or k == 1 for r, k in zip(allocation.retention, allocation.kept, strict=True)
    )


# --- bounds and reach ---


@pytest.mark.parametrize("ends", [(-0.1, 1.0), (0.5, 0.5), (0.6, 0.5), (0.1, 1.1), (float("nan"), 1.0)])
def test_bounds_refuse_ranges_that_are_none(ends: tuple[float, float]) -> None:
    with pytest.raises(ParameterError, match="min_keep"):
        Bounds(*ends)


def test_reach_is_not_fooled_by_float_fuzz() -> None:
    # 0.1 * 30 is 3.0000000000000004 and 0.7 * 10 is 7.000000000000001; 0.29 * 100 is 28.999999999999996.
    for granules, low, high, fewest, most in [
        (30, 0.1, 0.7, 3, 21),
        (10, 0.1, 0.7, 1, 7),
        (100, 0.1, 0.29, 10, 29),
    ]:
        units = [Unit("layers.0.ffn", "ffn", 0, granules, 5)]
        lowest, highest = 1 - most / granules, 1 - fewest / granules
        assert reachable(units, Bounds(low, high)) == (pytest.approx(lowest), pytest.approx(highest))


def test_a_unit_never_loses_its_last_granule() -> None:
    units = layers(2, 3, 50, 10, 5)
    lowest, highest = reachable(units, Bounds(0, 1))
    assert lowest == 0
    assert highest == (2 * 2 * 50 + 2 * 9 * 5) / sum(u.params for u in units)


def test_unreachable_target_teaches() -> None:
    units = [Unit("layers.0.ffn", "ffn", 0, 1000, 3), Unit("layers.1.attention", "attention", 1, 7, 30)]
    with pytest.raises(UnreachableSparsity) as refusal:
        check_reachable(units, 0.95, Bounds(0.1, 1))
    assert str(refusal.value) == (
        "sparsity 0.95 was asked for. Bounds [0.1, 1] reach 0.000 to 0.897. Lower search.min_keep or the target."
    )
    with pytest.raises(UnreachableSparsity, match=r"Raise search.max_keep or raise the target"):
        check_reachable(units, 0.05, Bounds(0.1, 0.9))
    with pytest.raises(UnreachableSparsity):
        check_reachable(units, float("nan"), Bounds(0.1, 0.9))


def test_bounds_without_a_whole_granule_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"layers.0.attention has 1 granules"):
        reachable(layers(1, 1, 50, 10, 5), Bounds(0.1, 0.9))


@FEW
@given(models(), BOUNDS, st.integers(1, 7), st.sampled_from(["water_fill", "greedy_fill"]))
def test_both_ends_of_the_reach_are_reached(units: list[Unit], bounds: Bounds, step: int, mapping: str) -> None:
    assume(possible(units, bounds))
    scores = np.linspace(1, -1, len(units))
    for end, pick in zip(reachable(units, bounds), (max, min), strict=True):
        allocation = map_scores(scores, units, end, bounds, mapping, step)
        assert allocation.kept == tuple(pick(oracle.granule_limits(unit, bounds)) for unit in units)
        assert allocation.sparsity == end


# --- mappings against their twins ---


@FEW
@given(st.data(), models(), BOUNDS, st.floats(0, 1))
@pytest.mark.parametrize("name", sorted(MAPPINGS))
def test_mapping_equals_its_twin(
    name: str, data: st.DataObject, units: list[Unit], bounds: Bounds, share: float
) -> None:
    assume(possible(units, bounds))
    sparsity = target_between(units, bounds, share)
    scores = draw_scores(data, len(units))
    expected = getattr(oracle, name)(scores.tolist(), units, sparsity, bounds)
    np.testing.assert_allclose(MAPPINGS[name](scores, units, sparsity, bounds), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["water_fill", "greedy_fill"])
def test_mappings_are_on_budget_before_rounding(name: str) -> None:
    scores = np.random.default_rng(0).normal(size=len(LLAMA))
    sizes = np.array([unit.params for unit in LLAMA])
    retentions = MAPPINGS[name](scores, LLAMA, 0.3, Bounds(0.2, 0.9))
    assert (retentions * sizes).sum() / sizes.sum() == pytest.approx(0.7, abs=1e-12)


def test_the_squash_is_not_the_printed_one() -> None:
    # The printed tanh(A + 1) / 2 would give 0.38 for a score of 0.
    units = layers(1, 4, 10, 4, 10)
    np.testing.assert_allclose(MAPPINGS["water_fill"](np.zeros(2), units, 0.5, Bounds(0, 1)), 0.5)


def test_water_fill_reads_sizes_and_greedy_fill_only_order() -> None:
    near, far = np.linspace(0.1, -0.1, len(LLAMA)), np.linspace(2, -2, len(LLAMA))
    bounds = Bounds(0.2, 1)
    greedy, water = MAPPINGS["greedy_fill"], MAPPINGS["water_fill"]
    np.testing.assert_array_equal(greedy(near, LLAMA, 0.3, bounds), greedy(far, LLAMA, 0.3, bounds))
    assert np.ptp(water(near, LLAMA, 0.3, bounds)) < 0.1 < 0.6 < np.ptp(water(far, LLAMA, 0.3, bounds))


def test_unknown_mapping_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="greedy_fill, sequential_cap, water_fill"):
        map_scores(np.zeros(len(LLAMA)), LLAMA, 0.3, Bounds(0.1, 1), mapping="waterfall")


# --- exact budget ---


@FEW
@given(st.data(), models(), BOUNDS, st.floats(0, 1), st.integers(1, 9), st.sampled_from(sorted(MAPPINGS)))
def test_budget_is_exact_and_bounds_hold(
    data: st.DataObject, units: list[Unit], bounds: Bounds, share: float, step: int, mapping: str
) -> None:
    assume(possible(units, bounds))
    sparsity = target_between(units, bounds, share)
    smallest = min(unit.params_per_granule for unit in units)
    span = sum(
        max(oracle.granule_limits(unit, bounds)) - min(oracle.granule_limits(unit, bounds))
        for unit in units
        if unit.params_per_granule == smallest
    )
    scores = draw_scores(data, len(units))
    try:
        allocation = map_scores(scores, units, sparsity, bounds, mapping, step)
    except UnreachableSparsity:
        assert (span + 1) * smallest < max(unit.params_per_granule for unit in units)
        return
    assert inside(allocation, bounds)
    assert allocation.sparsity >= sparsity
    if mapping != "sequential_cap":
        assert oracle.is_exact(allocation, sparsity, smallest)


@FEW
@given(st.data(), models(most_layers=2, most_channels=5), BOUNDS, st.floats(0, 1))
def test_refused_only_if_no_allocation_at_all_is_exact(
    data: st.DataObject, units: list[Unit], bounds: Bounds, share: float
) -> None:
    assume(possible(units, bounds))
    sparsity = target_between(units, bounds, share)
    try:
        map_scores(draw_scores(data, len(units)), units, sparsity, bounds)
        found = True
    except UnreachableSparsity:
        found = False
    assert found == oracle.exact_exists(units, sparsity, bounds)


@FEW
@given(st.data(), st.floats(0, 1), st.floats(0, 1))
def test_any_retentions_end_on_budget(data: st.DataObject, share: float, level: float) -> None:
    bounds = Bounds(0.1, 0.9)
    sparsity = target_between(LLAMA, bounds, share)
    retentions = np.full(len(LLAMA), level)
    allocation = to_allocation(retentions, draw_scores(data, len(LLAMA)), LLAMA, sparsity, bounds, 64)
    assert oracle.is_exact(allocation, sparsity, 1728)
    assert inside(allocation, bounds)


def test_units_without_ffn_are_exact_to_their_own_granule() -> None:
    units = [Unit(f"layers.{i}.attention", "attention", i, 5, 100) for i in range(4)]
    allocation = map_scores(np.array([1.0, 0, -1, 0]), units, 0.33, Bounds(0.2, 1))
    assert allocation.removed == 700


def test_target_on_a_granule_removes_no_granule_more() -> None:
    # 0.1 * 30 > 3 in floats; the allocation's own sparsity, 3 / 30, is what counts.
    units = [Unit("layers.0.ffn", "ffn", 0, 30, 1)]
    assert map_scores(np.zeros(1), units, 0.1, Bounds(0.1, 1)).removed == 3


# --- who is corrected ---


def test_remainder_goes_to_the_highest_score_and_past_a_bound_to_the_next() -> None:
    units = [Unit(f"layers.{i}.ffn", "ffn", i, 12, 5) for i in range(3)]
    scores = np.array([1.0, 3, 2])
    # 15 channels stay: four each, and three that are less than a step.
    third = to_allocation(np.full(3, 1 / 3), scores, units, 21 / 36, Bounds(0, 1), step=4)
    assert third.kept == (4, 7, 4)
    full = to_allocation(np.array([1 / 3, 1, 1 / 3]), scores, units, 13 / 36, Bounds(0, 1), step=4)
    assert full.kept == (4, 12, 7)


def test_channels_make_up_for_attention_all_alike() -> None:
    units = layers(3, 2, 50, 10, 5)
    scores = np.array([0.0, 1, 0, 3, 0, 2])
    # 260 of 450 parameters: half the heads are 150, which leaves eight of thirty channels.
    assert to_allocation(np.full(6, 0.5), scores, units, 260 / 450, Bounds(0, 1)).kept == (1, 2, 1, 3, 1, 3)


@FEW
@given(st.floats(0, 1), st.sampled_from([1, 32, 64]))
def test_equal_scores_stay_equal_up_to_a_step(share: float, step: int) -> None:
    # Rounding paid for by one unit alone would empty it: 30 layers rounded to a step each are a whole FFN.
    model = layers(30, 3, 294_912, 1536, 1728)
    sparsity = target_between(model, Bounds(0.25, 1), share)
    kept = map_scores(np.zeros(len(model)), model, sparsity, Bounds(0.25, 1), step=step).kept
    assert max(kept[1::2]) - min(kept[1::2]) < 2 * step


@FEW
@given(st.data(), models(), BOUNDS)
def test_an_allocation_on_budget_is_left_alone(data: st.DataObject, units: list[Unit], bounds: Bounds) -> None:
    assume(possible(units, bounds))
    kept = tuple(data.draw(st.sampled_from(oracle.granule_limits(unit, bounds))) for unit in units)
    given_one = Allocation(tuple(units), kept)
    again = to_allocation(
        np.array(given_one.retention), draw_scores(data, len(units)), units, given_one.sparsity, bounds
    )
    assert again.kept == kept


def test_attention_moves_only_when_channels_have_no_room() -> None:
    units = layers(2, 4, 50, 10, 5)
    scores = np.array([2.0, 0, 1, 0])
    dense = np.ones(4)
    # 500 parameters: 90 by channels at most, so 200 need three granules, highest score first.
    assert to_allocation(dense, scores, units, 90 / 500, Bounds(0, 1)).kept == (4, 1, 4, 1)
    pushed = to_allocation(dense, scores, units, 250 / 500, Bounds(0, 1))
    assert (pushed.kept[0], pushed.kept[2]) == (1, 3)
    assert pushed.removed == 250


@FEW
@given(st.data(), st.floats(0, 1), st.sampled_from(["water_fill", "greedy_fill"]))
def test_at_most_one_ffn_leaves_the_grid(data: st.DataObject, share: float, mapping: str) -> None:
    bounds = Bounds(0.25, 1)
    sparsity = target_between(LLAMA, bounds, share)
    allocation = map_scores(draw_scores(data, len(LLAMA)), LLAMA, sparsity, bounds, mapping, step=64)
    off = [k for u, k in zip(LLAMA, allocation.kept, strict=True) if u.kind == "ffn" and k % 64]
    assert len(off) <= 1


def test_sequential_cap_may_prune_more_than_asked_but_never_less() -> None:
    low = map_scores(np.full(len(LLAMA), -2.0), LLAMA, 0.3, Bounds(0.1, 1), "sequential_cap")
    assert low.sparsity > 0.5
    high = map_scores(np.full(len(LLAMA), 2.0), LLAMA, 0.3, Bounds(0.1, 1), "sequential_cap")
    assert 0.3 <= high.sparsity < 0.35


def test_inputs_are_not_changed() -> None:
    retentions, scores = np.full(len(LLAMA), 0.7), np.zeros(len(LLAMA))
    to_allocation(retentions, scores, LLAMA, 0.4, Bounds(0.1, 1))
    assert (retentions == 0.7).all()
    assert (scores == 0).all()


def test_broken_inputs_are_refused() -> None:
    good, bounds = np.zeros(len(LLAMA)), Bounds(0.1, 1)
    with pytest.raises(ValueError, match="12 numbers"):
        to_allocation(good[:-1], good, LLAMA, 0.3, bounds)
    with pytest.raises(ValueError, match="scores"):
        to_allocation(good, np.full(len(LLAMA), np.nan), LLAMA, 0.3, bounds)
    with pytest.raises(ParameterError, match="step 0"):
        to_allocation(good, good, LLAMA, 0.3, bounds, step=0)


# --- the inverse ---


@FEW
@given(st.data(), st.floats(0.05, 0.95))
def test_scores_for_inverts_water_fill(data: st.DataObject, sparsity: float) -> None:
    bounds = Bounds(0.0, 1)
    scores = draw_scores(data, len(LLAMA)) / 2
    retentions = MAPPINGS["water_fill"](scores, LLAMA, sparsity, bounds)
    back = MAPPINGS["water_fill"](scores_for(retentions, bounds), LLAMA, sparsity, bounds)
    np.testing.assert_allclose(back, retentions, rtol=0, atol=0.04)


def test_scores_for_is_clipped() -> None:
    scores = scores_for(np.array([0.0, 0.1, 0.55, 1.0]), Bounds(0.1, 1), limit=1.5)
    np.testing.assert_allclose(scores, [-1.5, -1.5, 0, 1.5], atol=1e-12)
