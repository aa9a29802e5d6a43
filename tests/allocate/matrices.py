"""More worlds: weight matrices as units, models of either granularity, and a reward that changes its mind."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from ffprune.core.budget import Bounds, limits
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation, Unit
from tests.allocate.worlds import Bandit, models

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def matrices(layers: int, sizes: tuple[int, ...] = (3600, 1200, 1200, 3600, 9600, 9600, 9600)) -> tuple[Unit, ...]:
    """The matrices of equal layers."""
    return tuple(
        Unit(f"layers.{i}.{role}", "weight", i, size, 1)
        for i in range(layers)
        for role, size in zip(ROLES, sizes, strict=True)
    )


@st.composite
def weight_models(draw: st.DrawFn) -> tuple[Unit, ...]:
    """Layers of one shape; matrices of a few weights to a million."""
    sizes = draw(st.tuples(*[st.integers(10, 1_000_000)] * len(ROLES)))
    return matrices(draw(st.integers(1, 3)), sizes)


any_models = st.one_of(models(), weight_models())


def assert_inside(allocation: Allocation, bounds: Bounds) -> None:
    """Every unit is inside its bounds, and has one granule at least."""
    for unit, kept, retention in zip(allocation.units, allocation.kept, allocation.retention, strict=True):
        assert kept >= 1, unit
        assert kept == 1 or bounds.low <= retention, unit
        assert retention <= bounds.high, unit


def has_gaps(units: Sequence[Unit], bounds: Bounds) -> bool:
    """Whether the smallest granules have less room than one of the largest: then not every target is reached."""
    smallest, largest = (pick(u.params_per_granule for u in units) for pick in (min, max))
    fine = [u for u in units if u.params_per_granule == smallest]
    low, high = limits(fine, bounds)
    return (sum(high) - sum(low)) * smallest < largest


class Fickle(Bandit):
    """A bandit whose units matter the other way round on the samples of a search (``draw`` given)."""

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        outer = Bandit(self.weights if samples.draw is None else self.weights.max() - self.weights, noise=self.noise)
        return outer(allocation, samples)
