from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ffprune.allocate.uniform import handmade, uniform
from ffprune.core.budget import Bounds, reachable
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.units import Unit
from tests.allocate.worlds import assert_exact, between, layers, models

MANY = settings(deadline=None, max_examples=60)


@MANY
@given(models(), st.floats(0, 0.4), st.floats(0, 1))
def test_uniform_is_exact_inside_its_bounds(units: tuple[Unit, ...], low: float, share: float) -> None:
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    found = uniform(units, target, bounds)
    assert_exact(found, target)
    assert all(k >= 1 and (r >= low or k == 1) for k, r in zip(found.kept, found.retention, strict=True))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_uniform_is_as_near_to_one_share_as_granules_allow(sparsity: float) -> None:
    units = layers(6, heads=9, head=64, channels=300, channel=4)
    found = uniform(units, sparsity, Bounds(0.05, 1.0))
    for unit, retention in zip(units, found.retention, strict=True):
        if unit.kind == "attention":
            assert abs(retention - (1 - sparsity)) <= 0.5 / unit.granules + 1e-9
    channels = [k for u, k in zip(units, found.kept, strict=True) if u.kind == "ffn"]
    assert max(channels) - min(channels) <= 1


def test_uniform_of_units_without_attention_granules_to_spare() -> None:
    # One group per layer cannot go at all: the channels give everything.
    units = layers(3, heads=1, head=40, channels=60)
    found = uniform(units, 0.3, Bounds(0.05, 1.0))
    assert_exact(found, 0.3)
    assert [k for u, k in zip(units, found.kept, strict=True) if u.kind == "attention"] == [1, 1, 1]


@MANY
@given(models(least_layers=3), st.floats(0, 0.4), st.floats(0, 1))
def test_handmade_is_exact_and_takes_inner_channels_only(units: tuple[Unit, ...], low: float, share: float) -> None:
    bounds = Bounds(low, 1.0)
    inner = [u for u in units if u.kind == "ffn" and 0 < u.layer < units[-1].layer]
    part, whole = (sum(u.params for u in some) for some in (inner, units))
    target = between(inner, bounds, share) * part / whole
    # At the very end of the reach the last float bit of the target may lie beyond it.
    assume(math.ceil(target * whole) <= round(reachable(inner, bounds)[1] * part))
    found = handmade(units, target, bounds)
    assert_exact(found, target)
    for unit, kept in zip(units, found.kept, strict=True):
        if unit not in inner:
            assert kept == unit.granules


def test_handmade_takes_an_equal_share_of_every_inner_layer() -> None:
    found = handmade(layers(6, channels=100), 0.2, Bounds(0.05, 1.0))
    retentions = [r for u, r in zip(found.units, found.retention, strict=True) if u.kind == "ffn"]
    assert (retentions[0], retentions[-1]) == (1.0, 1.0)
    assert max(retentions[1:-1]) - min(retentions[1:-1]) < 0.011


@pytest.mark.parametrize("count", [1, 2])
def test_handmade_without_inner_layers_takes_all_channels(count: int) -> None:
    found = handmade(layers(count), 0.2, Bounds(0.05, 1.0))
    assert_exact(found, 0.2)
    assert all(k == u.granules for u, k in zip(found.units, found.kept, strict=True) if u.kind == "attention")


def test_handmade_refuses_more_than_inner_channels_can_give() -> None:
    units = layers(4)
    # Inner channels hold 30.8% of all weights.
    assert 2 * units[1].params / sum(u.params for u in units) == pytest.approx(0.3077, abs=1e-4)
    handmade(units, 0.28, Bounds(0.05, 1.0))
    with pytest.raises(UnreachableSparsity, match=r"sparsity 0\.31 was asked .* 0\.000 to 0\.288 of all") as caught:
        handmade(units, 0.31, Bounds(0.05, 1.0))
    assert "handmade" in caught.value.change


def test_handmade_refuses_where_measured_channels_cost_nothing() -> None:
    free = [replace(unit, price=np.zeros(unit.granules + 1, dtype=np.int64)) for unit in layers(4)[1::2]]
    units = tuple(unit for pair in zip(layers(4)[::2], free, strict=True) for unit in pair)
    with pytest.raises(UnreachableSparsity, match=r"0\.000 to 0\.000 of all"):
        handmade(units, 0.2, Bounds(0.05, 1.0))


def test_uniform_refuses_what_no_unit_can_give() -> None:
    with pytest.raises(UnreachableSparsity, match=r"0\.000 to 0\.769"):
        uniform(layers(2, channels=100), 0.95, Bounds(0.2, 1.0))
