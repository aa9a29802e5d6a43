from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ffprune.allocate.flap import global_threshold
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.units import Unit
from tests.allocate.matrices import assert_inside, has_gaps, matrices
from tests.allocate.worlds import assert_exact, between, layers, models
from tests.oracles import flap as oracle

LOOSE = Bounds(0.0, 1.0)


def drawn(units: tuple[Unit, ...], seed: int, width: int = 1) -> list[np.ndarray]:
    """Skewed column scores of very different scales, as fluctuations are."""
    rng = np.random.default_rng(seed)
    return [
        10.0 ** rng.integers(-6, 6) * rng.exponential(size=u.granules * (width if u.kind == "attention" else 1)) ** 2
        for u in units
    ]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(10, 40), min_size=1, max_size=6),
    st.sampled_from([LOOSE, Bounds(0.3, 1.0), Bounds(0.0, 0.9), Bounds(0.4, 0.8)]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_equal_granules_are_cut_in_the_order_of_their_z_scores(
    sizes: list[int], bounds: Bounds, share: float, seed: int
) -> None:
    units = tuple(Unit(f"layers.{i}.ffn", "ffn", i, n, 7) for i, n in enumerate(sizes))
    scores, sparsity = drawn(units, seed), between(units, bounds, share)
    expected = oracle.equal_granules(units, scores, sparsity, bounds)
    assert list(global_threshold(units, scores, sparsity, bounds).kept) == expected


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(2, 20), st.floats(0.05, 0.6), st.integers(0, 1000))
def test_heads_are_cut_where_the_published_threshold_cuts_them(
    count: int, heads: int, worth: int, sparsity: float, seed: int
) -> None:
    units = layers(count, heads=heads, head=3 * worth, channels=120, channel=3)
    scores = drawn(units, seed, width=8)
    expected = oracle.published(units, scores, [8 if u.kind == "attention" else 1 for u in units], sparsity)
    assume(min(expected) >= 1)
    found = global_threshold(units, scores, sparsity, LOOSE)
    assert_exact(found, sparsity)
    for unit, kept, published in zip(units, found.kept, expected, strict=True):
        if unit.kind == "attention":
            assert kept == published
        else:  # Channels make up for half a head at most.
            assert abs(kept - published) <= worth / 2 + 1


@settings(deadline=None, max_examples=50)
@given(models(), st.floats(0, 1), st.floats(0, 0.4), st.sampled_from([1.0, 0.95]), st.integers(0, 1000))
def test_budget_is_exact_and_bounds_hold(
    units: tuple[Unit, ...], share: float, low: float, high: float, seed: int
) -> None:
    bounds = Bounds(low, high)
    if any(int(bounds.high * u.granules) < max(1, bounds.low * u.granules) for u in units):
        return
    target = between(units, bounds, share)
    try:
        found = global_threshold(units, drawn(units, seed), target, bounds)
    except UnreachableSparsity as refusal:
        assert "gaps" in str(refusal)
        assert has_gaps(units, bounds)
        return
    assert_exact(found, target)
    assert_inside(found, bounds)


def test_units_are_compared_by_shape_not_by_scale() -> None:
    units = layers(3)
    scores = drawn(units, 0)
    scaled = [10.0**i * score + i for i, score in enumerate(scores)]
    assert global_threshold(units, scaled, 0.3, LOOSE).kept == global_threshold(units, scores, 0.3, LOOSE).kept


def test_columns_count_before_heads_do() -> None:
    # The same three heads, once with noisy columns inside: those shrink what the z-scores of the heads can be.
    units = layers(2, heads=3, head=40, channels=60, channel=4)
    heads = np.array([1.0, 5.0, 9.0])
    noisy = heads[:, None] + np.array([-40.0, 40.0, 0.0, 0.0])
    channels = np.linspace(0, 1, 60)
    alone, inside = (global_threshold(units, [a, channels] * 2, 0.3, LOOSE) for a in (heads, noisy))
    assert alone.kept[0] == 2
    assert inside.kept[0] == 3
    assert global_threshold(units, [noisy.flatten(), channels] * 2, 0.3, LOOSE).kept == inside.kept


def test_what_the_upper_bound_takes_counts_towards_the_budget() -> None:
    units = layers(1, heads=10, head=40, channels=100, channel=4)
    # One head and ten channels must go; twenty more channels are the worst of the rest, and enough.
    heads, channels = np.append(0.0, np.ones(9)), np.append(np.zeros(30), np.ones(70))
    target = (40 + 30 * 4) / sum(u.params for u in units)
    assert global_threshold(units, [heads, channels], target, Bounds(0.0, 0.9)).kept == (9, 70)


def test_one_granule_stays_however_little_it_is_worth() -> None:
    units = layers(4, heads=2, head=8, channels=50, channel=4)
    # Layer 1: one column towers over all others, whose z-scores are the lowest of all layers.
    scores = drawn(units, 1)
    scores[3] = np.concatenate([[1e6], np.linspace(0, 1, 49)])
    found = global_threshold(units, scores, 0.7, LOOSE)
    assert_exact(found, 0.7)
    assert min(found.kept) >= 1
    bounded = global_threshold(units, scores, 0.7, Bounds(0.2, 1.0))
    assert_exact(bounded, 0.7)
    assert min(bounded.retention) >= 0.2


def test_scores_that_do_not_differ_are_all_average() -> None:
    units = (Unit("layers.0.attention", "attention", 0, 1, 30), Unit("layers.0.ffn", "ffn", 0, 40, 3))
    found = global_threshold(units, [np.ones(1), np.ones(40)], 0.3, LOOSE)
    assert found.kept == (1, 25)


def test_weight_matrices_are_refused() -> None:
    units = matrices(1)
    with pytest.raises(ParameterError, match=r"flap was asked for weight matrices\. .*heads and channels"):
        global_threshold(units, [np.ones(1)] * 7, 0.5, LOOSE)


@pytest.mark.parametrize("scores", [np.ones(7), np.array([1.0, np.nan, 2.0]), np.ones(0)])
def test_scores_that_do_not_fit_are_refused(scores: np.ndarray) -> None:
    units = layers(1)
    with pytest.raises(ValueError, match=r"layers\.0\.attention"):
        global_threshold(units, [scores, np.arange(48.0)], 0.3, LOOSE)


def test_an_unreachable_target_is_refused() -> None:
    units = layers(2)
    with pytest.raises(UnreachableSparsity, match=r"Lower search\.min_keep"):
        global_threshold(units, drawn(units, 0), 0.9, Bounds(0.5, 1.0))
