from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.gram import damped
from ffprune.core.inverse import inverse_factor

INDEFINITE = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
"""Eigenvalues 2.05 and -0.05: damping 0.01 is too little, 0.1 is enough."""


def gram(n: int, tokens: int = 30, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
def test_the_factor_is_upper_and_that_of_every_trailing_inverse(n: int, tokens: int, seed: int) -> None:
    xx = gram(n, tokens, seed)
    found, h = inverse_factor(xx, 0.01), damped(xx, 0.01)
    assert torch.equal(found.upper, found.upper.triu())
    assert found.damping == 0.01
    for j in range(n):
        part = found.upper[j:, j:]
        torch.testing.assert_close(part.T @ part, torch.linalg.inv(h[j:, j:]), rtol=1e-8, atol=1e-10)


def test_dead_inputs_count_as_one() -> None:
    xx = gram(5).float()
    xx[2, :] = xx[:, 2] = 0
    before = xx.clone()
    found = inverse_factor(xx, 0.01)
    assert found.dead.tolist() == [False, False, True, False, False]
    revived = xx.double()
    revived[2, 2] = 1
    torch.testing.assert_close(found.upper.T @ found.upper, torch.linalg.inv(damped(revived, 0.01)))
    assert torch.equal(xx, before)


def test_damping_is_raised_only_where_it_fails_and_the_result_says_so() -> None:
    found = inverse_factor(INDEFINITE, 0.01)
    assert found.damping == pytest.approx(0.1)
    expected = torch.linalg.inv(damped(INDEFINITE.double(), found.damping))
    torch.testing.assert_close(found.upper.T @ found.upper, expected)
    assert inverse_factor(INDEFINITE, 0.06).damping == 0.06


@pytest.mark.parametrize(("xx", "damping", "most"), [(INDEFINITE, 0.01, 0.01), (-INDEFINITE, 0.01, 1.0)])
def test_damping_is_not_raised_beyond_the_limit(xx: Tensor, damping: float, most: float) -> None:
    with pytest.raises(ParameterError, match=f"damping 0.01 was asked for.*up to {most:g}.*more tokens"):
        inverse_factor(xx, damping, most)


def test_no_damping_is_taken_at_its_word() -> None:
    xx = gram(4)
    found = inverse_factor(xx, 0.0)
    torch.testing.assert_close(found.upper.T @ found.upper, torch.linalg.inv(xx))
    with pytest.raises(ParameterError, match="damping 0.0 was asked for"):
        inverse_factor(INDEFINITE, 0.0)
    with pytest.raises(ParameterError, match="0 or more"):
        inverse_factor(xx, -0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(1, 1), (0, 2)])
def test_statistics_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    xx = gram(3)
    xx[place] = xx[place[::-1]] = bad
    with pytest.raises(ParameterError, match="finite"):
        inverse_factor(xx, 0.01)
