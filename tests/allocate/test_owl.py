from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.owl import owl
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.units import Unit
from tests.allocate.matrices import any_models, assert_inside, has_gaps, matrices
from tests.allocate.worlds import assert_exact, between, layers

WIDE = Bounds(0.0, 1.0)
SQUARE = (1000,) * 7


def published(ratios: np.ndarray, sparsity: float, half_width: float) -> np.ndarray:
    """The twin: densities of layers, transcribed from the published code."""
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * half_width * 2)
    return ratios - np.mean(ratios) + (1 - sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True))
def test_equal_matrices_get_the_published_densities_and_the_mean_is_exact(sparsity: float, permille: list[int]) -> None:
    units, shares = matrices(len(permille), SQUARE), np.array(permille) / 1000
    found = owl(units, np.repeat(shares, 7), sparsity, 0.08, WIDE)
    expected = np.repeat(published(shares, sparsity, 0.08), 7)
    np.testing.assert_allclose(found.retention, expected, atol=1 / 1000 + 1e-9)
    assert np.ptp(found.retention) == pytest.approx(0.16, abs=2 / 1000)
    assert found.sparsity == sparsity


@settings(deadline=None, max_examples=60)
@given(any_models, st.floats(0, 1), st.floats(0, 0.4), st.floats(0, 0.5), st.integers(0, 1000))
def test_budget_is_exact_and_bounds_hold(
    units: tuple[Unit, ...], share: float, low: float, half_width: float, seed: int
) -> None:
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    outliers = np.random.default_rng(seed).exponential(0.01, size=units[-1].layer + 1)
    try:
        found = owl(units, outliers[[unit.layer for unit in units]], target, half_width, bounds)
    except UnreachableSparsity as refusal:
        assert "gaps" in str(refusal)
        assert has_gaps(units, bounds)
        return
    assert_exact(found, target)
    assert_inside(found, bounds)


def test_more_outliers_keep_more_only_by_how_layers_compare() -> None:
    units = matrices(4)
    shares = np.repeat([0.02, 0.05, 0.01, 0.03], 7)
    found = owl(units, shares, 0.6, 0.08, WIDE)
    by_layer = [found.retention[7 * i] for i in range(4)]
    assert np.argsort(by_layer).tolist() == [2, 0, 3, 1]
    # In percent, or shifted, they say the same.
    for other in (100 * shares, shares + 3.0):
        np.testing.assert_allclose(owl(units, other, 0.6, 0.08, WIDE).kept, found.kept, atol=1)


def test_structured_units_move_too() -> None:
    units = layers(4, heads=8, head=24, channels=200)
    found = owl(units, np.repeat([4.0, 1.0, 2.0, 3.0], 2), 0.3, 0.2, Bounds(0.05, 1.0))
    assert_exact(found, 0.3)
    channels = [k for u, k in zip(units, found.kept, strict=True) if u.kind == "ffn"]
    assert np.argsort(channels).tolist() == [1, 2, 3, 0]
    assert max(channels) - min(channels) == pytest.approx(0.4 * 200, abs=2)


def test_layers_that_do_not_differ_get_the_same() -> None:
    units = matrices(3)
    assert owl(units, np.full(21, 0.01), 0.5, 0.08, WIDE).kept == uniform(units, 0.5, WIDE).kept


def test_shares_that_are_none_are_refused() -> None:
    units = matrices(1)
    for shares in (np.array([0.1, np.nan, 0, 0, 0, 0, 0]), np.array([0.1, 0.2])):
        with pytest.raises(ValueError, match="7 numbers, one per unit"):
            owl(units, shares, 0.5, 0.08, WIDE)
