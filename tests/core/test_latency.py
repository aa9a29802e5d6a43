from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.core.latency import BlockTimes, isotonic, measured_counts
from tests.oracles import uneven

TIMES = st.lists(st.floats(-5, 50), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(TIMES)
def test_isotonic_is_that_of_the_twin(values: list[float]) -> None:
    np.testing.assert_allclose(isotonic(np.array(values)), uneven.isotonic(values), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(TIMES, st.integers(0, 40))
def test_a_price_never_falls_and_has_a_number_for_every_count(values: list[float], more: int) -> None:
    kept = (1, *range(2, len(values)), len(values) + more) if len(values) > 1 else (1,)
    times = BlockTimes(("layers.0.ffn",), kept[-1], kept, tuple(values))
    assert times.price.dtype == np.int64
    assert len(times.price) == times.granules + 1
    assert (np.diff(times.price) >= 0).all()
    assert times.price[0] == times.price[1] >= 0


def test_a_price_is_measured_nanoseconds_and_straight_lines_between() -> None:
    times = BlockTimes(("layers.0.ffn",), 8, (1, 4, 8), (1.0, 4.0, 6.0))
    assert times.price.tolist() == [1e6, 1e6, 2e6, 3e6, 4e6, 4.5e6, 5e6, 5.5e6, 6e6]
    # What measured slower than something wider is pooled with it.
    slow = BlockTimes(("layers.0.ffn",), 3, (1, 2, 3), (1.0, 4.0, 3.0))
    assert slow.price.tolist() == [1e6, 1e6, 3.5e6, 3.5e6]


@pytest.mark.parametrize(
    ("granules", "widths", "counts"),
    [
        (3, 12, (1, 2, 3)),
        (1, 4, (1,)),
        (1536, 4, (1, 384, 768, 1152, 1536)),
        # Multiples of 32 where they are fine enough, any number elsewhere.
        (11008, 3, (1, 3680, 7328, 11008)),
        (100, 4, (1, 25, 50, 75, 100)),
        (7, 1, (1, 7)),
    ],
)
def test_measured_widths_are_spread_evenly(granules: int, widths: int, counts: tuple[int, ...]) -> None:
    assert measured_counts(granules, widths) == counts
