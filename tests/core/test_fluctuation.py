from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.fluctuation import wifv
from ffprune.core.gram import Gram
from ffprune.core.importance import by_scores
from tests.oracles import fluctuation as oracle


def problem(n: int, d_out: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw) * torch.rand(n, generator=draw) + torch.randn(n, generator=draw)
    return torch.randn(d_out, n, generator=draw), x


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 30), st.booleans(), st.integers(0, 1000))
def test_it_is_its_definition(n: int, d_out: int, tokens: int, full: bool, seed: int) -> None:
    weight, x = problem(n, d_out, tokens, seed)
    gram = Gram.zeros(n, full=full).update(x)
    found = wifv(weight, gram)
    expected = torch.tensor(oracle.wifv(weight, x), dtype=torch.float64)
    assert found.dtype == torch.float64
    # A Gram's sums are float32: around a mean far from 0, what is left is as exact as the uncentred sum it came from.
    uncentred = weight.double().square().sum(0) * x.double().square().sum(0)
    assert bool(((found - expected).abs() <= 1e-5 * uncentred + 1e-12).all())
    assert torch.equal(wifv(weight, gram, squared=True), found.square())


def test_a_loud_column_that_never_moves_is_worth_nothing() -> None:
    # Its mean replaces it for free: that is what a bias can do, and where FLAP and Wanda part.
    weight, x = problem(4, 3, 50, 0)
    x[:, 1] = 100.0
    assert int(wifv(weight, Gram.zeros(4, full=False).update(x)).argmin()) == 1


def test_the_extra_square_can_turn_the_order_of_heads() -> None:
    even, spiked = [1.0, 1.0, 1.0, 1.0], [3.0, 0.1, 0.1, 0.1]
    columns = torch.tensor(even + spiked, dtype=torch.float64)
    assert int(by_scores(columns, 4).order[0]) == 0
    assert int(by_scores(columns.square(), 4).order[0]) == 1


def test_without_tokens_there_is_no_fluctuation() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        wifv(torch.ones(2, 3), Gram.zeros(3, full=False))
