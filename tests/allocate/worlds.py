"""Units of no model, and a reward whose best answer is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import strategies as st

from ffprune.core.budget import Bounds, reachable
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation, Unit


def layers(count: int, heads: int = 3, head: int = 40, channels: int = 48, channel: int = 4) -> tuple[Unit, ...]:
    """A model of equal layers."""
    return tuple(
        unit
        for i in range(count)
        for unit in (
            Unit(f"layers.{i}.attention", "attention", i, heads, head),
            Unit(f"layers.{i}.ffn", "ffn", i, channels, channel),
        )
    )


def matrices(count: int, weights: int = 4000) -> tuple[Unit, ...]:
    """The weight matrices of ``count`` equal layers; gate, up and down are three times as large."""
    return tuple(
        Unit(f"layers.{i}.{role}", "weight", i, weights * (3 if role in ("gate", "up", "down") else 1), 1)
        for i in range(count)
        for role in ("q", "k", "v", "o", "gate", "up", "down")
    )


@st.composite
def models(draw: st.DrawFn, least_layers: int = 1, most_layers: int = 5) -> tuple[Unit, ...]:
    """Layers of uneven widths; a granule of attention is worth at least one channel."""
    channel = draw(st.integers(1, 12))
    head = channel * draw(st.integers(1, 15)) + draw(st.integers(0, 11))
    units = []
    for i in range(draw(st.integers(least_layers, most_layers))):
        units.append(Unit(f"layers.{i}.attention", "attention", i, draw(st.integers(1, 6)), head))
        units.append(Unit(f"layers.{i}.ffn", "ffn", i, draw(st.integers(20, 60)), channel))
    return tuple(units)


def between(units: Sequence[Unit], bounds: Bounds, share: float) -> float:
    """A target inside the reach."""
    lowest, highest = reachable(units, bounds)
    return min(lowest + share * (highest - lowest), highest)


def assert_exact(allocation: Allocation, sparsity: float) -> None:
    """METHODS 1: never below the target, above it by less than one of the smallest granules."""
    smallest = min(unit.params_per_granule for unit in allocation.units)
    assert allocation.sparsity >= sparsity
    assert (allocation.removed - smallest) / allocation.prunable < sparsity


LAPS = 3
"""Calls that it takes to score a policy on all of the fixed samples of a :class:`Bandit`."""


class Bandit:
    """Removing a share of unit i costs weight[i] * share^2 nats; ``draw`` moves all outcomes alike.

    Args:
        weights: what each unit matters.
        broken: numbers of calls (from 0) that find no finite loss.
        noise: of the loss, between draws.
    """

    most_samples = 6
    fixed = 8

    def __init__(self, weights: Sequence[float], broken: Sequence[int] = (), noise: float = 0.05) -> None:
        self.weights, self.broken, self.noise = np.asarray(weights), frozenset(broken), noise
        self.calls: list[tuple[Allocation, Samples]] = []

    @property
    def draws(self) -> list[int | None]:
        """Of all calls."""
        return [samples.draw for _, samples in self.calls]

    def loss(self, allocation: Allocation) -> float:
        """The true loss of an allocation, nats."""
        return float((self.weights * (1 - np.array(allocation.retention)) ** 2).sum())

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        return (self(allocation, samples) for allocation in allocations)

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        self.calls.append((allocation, samples))
        dense = 10 * math.exp(0 if samples.draw is None else self.noise * math.sin(samples.draw))
        if len(self.calls) - 1 in self.broken:
            return Outcome(0.0, math.inf, math.inf, dense, False, samples.count)
        pruned = dense * math.exp(self.loss(allocation))
        return Outcome(dense / pruned, math.log(pruned / dense), pruned, dense, True, samples.count)
