from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.dynamic import dynamic_programming, front
from ffprune.core.budget import Bounds, reachable
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.units import Allocation, Unit
from tests.allocate.matrices import has_gaps
from tests.allocate.worlds import assert_exact, between, layers, models
from tests.oracles import dynamic as oracle


def falling(granules: int, seed: int) -> np.ndarray:
    """A loss that falls to 0 as more granules are kept; not convex."""
    steps = np.random.default_rng(seed).exponential(size=granules) ** 2
    return np.append(np.cumsum(steps)[::-1], 0.0)


def total(curves: list[np.ndarray], allocation: Allocation) -> float:
    return sum(float(curve[k]) for curve, k in zip(curves, allocation.kept, strict=True))


@st.composite
def tiny(draw: st.DrawFn) -> tuple[Unit, ...]:
    """Attention granules worth whole channels, few enough to try every allocation."""
    channel, worth = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    units = []
    for i in range(draw(st.integers(1, 2))):
        units.append(Unit(f"layers.{i}.attention", "attention", i, draw(st.integers(1, 3)), channel * worth))
        units.append(Unit(f"layers.{i}.ffn", "ffn", i, draw(st.integers(4, 9)), channel))
    return tuple(units)


@settings(deadline=None, max_examples=40)
@given(tiny(), st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 10_000))
def test_step_one_finds_the_cheapest_of_all_allocations(
    units: tuple[Unit, ...], share: float, low: float, seed: int
) -> None:
    bounds = Bounds(low, 1.0)
    curves = [falling(u.granules, seed + i) for i, u in enumerate(units)]
    target = between(units, bounds, share)
    found = dynamic_programming(units, curves, target, bounds, 1)
    best, _ = oracle.cheapest(units, curves, target, bounds)
    assert_exact(found, target)
    assert total(curves, found) == pytest.approx(best, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(tiny(), st.lists(st.floats(0, 1), min_size=2, max_size=4), st.sampled_from([1, 3]), st.integers(0, 10_000))
def test_several_sparsities_at_once_are_those_of_each(
    units: tuple[Unit, ...], shares: list[float], step: int, seed: int
) -> None:
    bounds = Bounds(0.25, 1.0)
    curves = [falling(u.granules, seed + i) for i, u in enumerate(units)]
    targets = [between(units, bounds, share) for share in shares]
    single = [dynamic_programming(units, curves, target, bounds, step) for target in targets]
    assert front(units, curves, targets, bounds, step) == single


@settings(deadline=None, max_examples=40)
@given(
    models(most_layers=4),
    st.floats(0, 1),
    st.sampled_from([1, 4, 7, 16, 100]),
    st.floats(0, 0.4),
    st.sampled_from([1.0, 0.95]),
    st.integers(0, 10_000),
)
def test_budget_is_exact_and_bounds_hold_for_any_step(
    units: tuple[Unit, ...], share: float, step: int, low: float, high: float, seed: int
) -> None:
    bounds = Bounds(low, high if all(u.granules > 1 for u in units) else 1.0)
    if any(int(bounds.high * u.granules) < max(1, bounds.low * u.granules) for u in units):
        return
    curves = [falling(u.granules, seed + i) for i, u in enumerate(units)]
    target = between(units, bounds, share)
    try:
        found = dynamic_programming(units, curves, target, bounds, step)
    except UnreachableSparsity as refusal:
        # Whole granules near the very ends of the reach leave gaps, which to_allocation explains.
        assert "gaps" in str(refusal)
        assert has_gaps(units, bounds)
        return
    assert_exact(found, target)
    for unit, kept, retention in zip(units, found.kept, found.retention, strict=True):
        assert kept == 1 or bounds.low <= retention, unit
        assert retention <= bounds.high, unit


def test_a_coarse_step_costs_little() -> None:
    units = layers(4, channels=64)
    curves = [np.linspace(1 + i, 0, u.granules + 1) ** 2 for i, u in enumerate(units)]
    fine, coarse = (dynamic_programming(units, curves, 0.3, Bounds(0.1, 1.0), step) for step in (1, 8))
    assert total(curves, fine) <= total(curves, coarse) <= 1.1 * total(curves, fine)


def test_it_beats_the_even_share_where_units_differ() -> None:
    units = layers(3)
    curves = [np.linspace(1, 0, u.granules + 1) ** 2 * (10 if u.layer == 0 else 1) for u in units]
    found = dynamic_programming(units, curves, 0.3, Bounds(0.1, 1.0), 1)
    even = sum(float(np.interp(0.7 * u.granules, range(u.granules + 1), c)) for u, c in zip(units, curves, strict=True))
    assert total(curves, found) < even
    assert min(found.retention[:2]) > max(found.retention[2:])


def test_what_no_allocation_reaches_is_refused() -> None:
    units = layers(2)
    curves = [falling(u.granules, i) for i, u in enumerate(units)]
    highest = reachable(units, Bounds(0.5, 1.0))[1]
    with pytest.raises(UnreachableSparsity, match=r"Lower search\.min_keep"):
        dynamic_programming(units, curves, highest + 0.01, Bounds(0.5, 1.0), 1)


def test_matrices_need_a_few_levels_only() -> None:
    """Losses of a million weights at 21 levels: on the exact budget, and where it costs least."""
    sizes, weights = (400_000, 1_000_003, 250_000, 999_999), (1.0, 4.0, 0.5, 2.0)
    units = tuple(Unit(f"layers.{i}.q", "weight", i, size, 1) for i, size in enumerate(sizes))
    levels = np.linspace(0, 1, 21)
    curves = [w * (1 - levels) ** 2 for w in weights]
    found = dynamic_programming(units, curves, 0.5, Bounds(0.05, 1.0), 1000)
    assert_exact(found, 0.5)
    # At the optimum of convex losses, the marginal loss of a weight is the same everywhere (up to a level).
    marginal = [2 * w * (1 - r) / n for w, r, n in zip(weights, found.retention, sizes, strict=True)]
    steps = [2 * w * 0.05 / n for w, n in zip(weights, sizes, strict=True)]
    inside = [i for i, r in enumerate(found.retention) if 0.1 < r < 0.95]
    assert len(inside) >= 2
    assert max(marginal[i] for i in inside) - min(marginal[i] for i in inside) <= 2 * max(steps[i] for i in inside)
