from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss
from ffprune.core.rotation import principal_basis, second_moment


def signal(tokens: int, n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64)
    return x @ torch.randn(n, n, generator=draw, dtype=torch.float64) + torch.randn(n, generator=draw)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000), st.data())
def test_the_first_directions_keep_what_the_svd_of_the_signal_keeps(
    n: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    x = signal(tokens, n, seed)
    basis = principal_basis(second_moment(x))
    torch.testing.assert_close(basis.T @ basis, torch.eye(n, dtype=torch.float64))
    k = data.draw(st.integers(1, n))
    sigma = torch.linalg.svdvals(x)[:k]
    torch.testing.assert_close((x @ basis[:, :k]).square().sum(), sigma.square().sum())


def test_directions_come_with_the_most_variance_first() -> None:
    x = signal(50, 8)
    variance = (x @ principal_basis(second_moment(x))).square().sum(0)
    assert (variance.diff() < 0).all()
    torch.testing.assert_close(variance, torch.linalg.svdvals(x).square())


def test_the_mean_is_not_taken_out() -> None:
    mean = torch.tensor([3.0, -4.0, 0.0])
    x = 0.01 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) + mean
    first = principal_basis(second_moment(x))[:, 0].float()
    assert abs(float(first @ mean)) == pytest.approx(5, rel=1e-4)


def test_damping_moves_no_direction() -> None:
    moment = second_moment(signal(50, 6))
    bases = [principal_basis(moment, damping) for damping in (0.0, 0.01, 1.0)]
    for basis in bases[1:]:
        torch.testing.assert_close((basis.T @ bases[0]).abs(), torch.eye(6, dtype=torch.float64))


def test_the_second_moment_is_summed_in_float64_whatever_the_shape() -> None:
    x = torch.randn(3, 3001, 4, generator=torch.Generator().manual_seed(0))
    found = second_moment(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.einsum("abi,abj->ij", x.double(), x.double()))
    assert principal_basis(found.float()).dtype == torch.float64


def test_a_signal_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match="width 3"):
        principal_basis(second_moment(torch.tensor([[1.0, torch.inf, 0.0]])))
