from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.trace_rank import trace_rank
from ffprune.core.budget import Bounds
from ffprune.core.units import Unit
from tests.allocate.worlds import assert_exact, layers

WIDE = Bounds(0.01, 1.0)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_equal_units_get_algorithm_1_as_retention(sparsity: float) -> None:
    # At 0.5 retention and sparsity look alike; at 0.7 only the reading as retention is on budget (METHODS 6).
    units = tuple(Unit(f"layers.{i}.ffn", "ffn", i, 1000, 3) for i in range(5))
    sensitivity = np.array([3.0, -1.0, 10.0, 0.5, 4.0])
    found = trace_rank(units, sensitivity, sparsity, 0.2, WIDE, 1)
    ranks = np.array([2, 0, 4, 1, 3])
    np.testing.assert_allclose(found.retention, 1 - sparsity - 0.2 + ranks * 0.1, atol=1e-9)
    assert found.sparsity == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@settings(deadline=None, max_examples=50)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 60), st.floats(0, 0.29), st.integers(0, 1000))
def test_uneven_units_are_shifted_onto_the_exact_budget(
    sparsity: float, count: int, heads: int, head: int, half_width: float, seed: int
) -> None:
    units = layers(count, heads=heads, head=max(head, 4), channels=400)
    sensitivity = np.random.default_rng(seed).normal(size=len(units))
    # One granule at least stays in every unit: a single large group cannot be cut at all.
    if heads * head > 400:
        return
    assert_exact(trace_rank(units, sensitivity, sparsity, half_width, WIDE, 1), sparsity)


def test_more_sensitive_ffns_keep_more() -> None:
    units = layers(6, heads=8, head=16, channels=400)
    sensitivity = np.arange(12.0)[::-1]
    found = trace_rank(units, sensitivity, 0.5, 0.25, Bounds(0.1, 1.0), 1)
    channels = [k for u, k in zip(units, found.kept, strict=True) if u.kind == "ffn"]
    assert channels == sorted(channels, reverse=True)
    assert channels[0] > channels[-1] + 100


def test_ranks_count_not_sizes() -> None:
    units = layers(3, channels=200)
    one = trace_rank(units, np.array([1.0, 2, 3, 4, 5, 6]), 0.5, 0.2, WIDE, 1)
    other = trace_rank(units, np.array([-1e9, 0, 1e-9, 2e-9, 1, 1e12]), 0.5, 0.2, WIDE, 1)
    assert one.kept == other.kept


def test_a_single_unit_gets_what_is_left() -> None:
    units = (Unit("layers.0.ffn", "ffn", 0, 10, 3),)
    assert trace_rank(units, np.array([1.0]), 0.5, 0.2, WIDE, 1).kept == (5,)


def test_layer_level_gives_a_layers_units_one_retention() -> None:
    units = tuple(Unit(f"layers.{i}.{role}", "weight", i, 1000, 1) for i in range(4) for role in "qk")
    # Sums per layer: 5, 2, 9, 3; the rank of the sum counts, not that of the unit.
    sensitivity = np.array([1.0, 4, 1, 1, 9, 0, 3, 0])
    found = trace_rank(units, sensitivity, 0.5, 0.3, WIDE, 1, by_layer=True)
    np.testing.assert_allclose(found.retention, np.repeat(0.2 + np.array([2, 0, 3, 1]) * 0.2, 2), atol=1e-9)
