from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffprune.core.errors import ParameterError
from ffprune.core.schedule import Schedule

PAPER = Schedule(alpha_start=0.2, k=0.01, t0=500)


def test_alpha_is_the_formula_of_methods_3() -> None:
    for t in (0, 1, 250, 500, 777, 2999):
        expected = 0.2 + 0.8 / (1 + math.exp(-0.01 * (t - 500)))
        assert PAPER.alpha(t) == pytest.approx(expected, abs=1e-14)


def test_alpha_rises_from_just_above_the_start_to_just_below_one() -> None:
    values = [PAPER.alpha(t) for t in range(0, 3001, 10)]
    assert values == sorted(values)
    assert 0.2 < values[0] < 0.206
    assert PAPER.alpha(500) == pytest.approx(0.6)
    assert 1 - 1e-9 < values[-1] < 1


@given(st.floats(0, 1), st.floats(1e-6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_alpha_stays_between_its_ends_however_steep(start: float, k: float, t0: float, t: float) -> None:
    assert start - 1e-12 <= Schedule(start, k, t0).alpha(t) <= 1 + 1e-12


def test_sparsity_and_samples_follow_alpha() -> None:
    assert PAPER.sparsity_at(500, 0.3) == pytest.approx(0.18)
    assert PAPER.samples_at(500, 128) == 77
    assert PAPER.samples_at(3000, 128) == 128
    assert Schedule(0, 0.01, 500).samples_at(0, 10) == 1


@pytest.mark.parametrize("episodes", [40, 100, 300, 3000, 9000])
def test_scaled_spends_the_same_share_on_each_phase(episodes: int) -> None:
    scaled = Schedule.scaled(alpha_start=0.2, k=0.01, t0=500, paper_episodes=3000, episodes=episodes)
    for share in (0, 0.1, 1 / 6, 0.5, 1):
        assert scaled.alpha(share * episodes) == pytest.approx(PAPER.alpha(share * 3000))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ParameterError, match="alpha_start"):
        Schedule(1.2, 0.01, 500)
    with pytest.raises(ParameterError, match="steepness"):
        Schedule(0.2, 0, 500)
    with pytest.raises(ParameterError, match="0 episodes"):
        Schedule.scaled(0.2, 0.01, 500, episodes=0)
