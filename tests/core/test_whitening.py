from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss, ParameterError
from ffprune.core.whitening import truncate
from tests.oracles import whitening as oracle


def problem(rows: int, n: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs and their Gram, float64; channels are correlated and of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64) * torch.logspace(0, 1.5, n, dtype=torch.float64)
    x = x @ (torch.eye(n) + torch.randn(n, n, generator=draw, dtype=torch.float64) / n**0.5)
    return torch.randn(rows, n, generator=draw, dtype=torch.float64), x, x.T @ x


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.data())
def test_it_is_the_best_map_of_its_rank(rows: int, n: int, seed: int, data: st.DataObject) -> None:
    weight, x, xx = problem(rows, n, 4 * n + 8, seed)
    rank = data.draw(st.integers(1, min(rows, n)))
    found = truncate(weight, xx, rank)
    assert found.left.shape == (rows, rank)
    assert found.right.shape == (rank, n)
    assert found.damping == 0
    expected = oracle.best(weight, x, rank)
    scale = float((weight @ x.T).square().sum())
    least = oracle.output_error(weight, expected, x)
    assert oracle.output_error(weight, found.left @ found.right, x) == pytest.approx(least, rel=1e-6, abs=1e-9 * scale)
    assert found.error == pytest.approx(least, rel=1e-6, abs=1e-9 * scale)


def test_the_error_is_the_discarded_singular_values_of_the_whitened_weight() -> None:
    weight, _, xx = problem(6, 8, 40)
    # Any S with S S^T = X^T X has them, not only Cholesky's.
    values, vectors = torch.linalg.eigh(xx)
    sigma = torch.linalg.svdvals(weight @ vectors @ values.sqrt().diag())
    errors = [truncate(weight, xx, rank).error for rank in range(1, 7)]
    torch.testing.assert_close(
        torch.tensor(errors), torch.stack([sigma[r:].square().sum() for r in range(1, 7)]).float()
    )
    assert errors == sorted(errors, reverse=True)


def test_it_beats_the_svd_of_the_weight_alone() -> None:
    weight, x, xx = problem(8, 8, 60)
    found = truncate(weight, xx, 3)
    u, sigma, vt = torch.linalg.svd(weight)
    plain = u[:, :3] @ sigma[:3].diag() @ vt[:3]
    assert oracle.output_error(weight, found.left @ found.right, x) < 0.5 * oracle.output_error(weight, plain, x)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("tokens", [40, 3])
def test_full_rank_is_the_weight_again(shape: tuple[int, int], tokens: int) -> None:
    weight, _, xx = problem(*shape, tokens)
    found = truncate(weight.float(), xx.float(), min(shape))
    assert found.left.dtype == found.right.dtype == torch.float32
    torch.testing.assert_close(found.left @ found.right, weight.float(), rtol=1e-4, atol=1e-4)


def test_a_failed_factorisation_is_damped_and_says_so() -> None:
    weight, x, xx = problem(6, 12, 4)
    xx = xx - 1e-3 * torch.eye(12)  # as rounding may leave it: not positive
    found = truncate(weight, xx, 4)
    assert found.damping == pytest.approx(1e-3 + 1e-6, rel=1e-3)
    # Four tokens span what a map of rank 4 can do exactly.
    scale = float((weight @ x.T).square().sum())
    assert oracle.output_error(weight, found.left @ found.right, x) < 1e-4 * scale


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8, 1e16])
def test_singular_statistics_of_any_scale_are_damped_enough(scale: float) -> None:
    weight, x, xx = problem(6, 12, 4)
    found = truncate(weight, scale * xx, 4)
    assert found.damping < 1e-5 * scale * float(xx.diagonal().mean()) + 1e-5
    assert (found.left @ found.right).isfinite().all()


def test_damping_that_is_not_enough_grows_tenfold(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, xx = problem(6, 12, 4)
    xx = xx - 2e-3 * torch.eye(12)
    # As if rounding had hidden the negative eigenvalues: 1e-6 is tried first.
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: torch.zeros(len(matrix)))
    assert truncate(weight, xx, 4).damping == pytest.approx(1e-2)


def test_no_statistics_at_all_leave_the_plain_svd() -> None:
    weight = problem(5, 7, 1)[0]
    found = truncate(weight, torch.zeros(7, 7), 2)
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(found.left @ found.right, u[:, :2] @ sigma[:2].diag() @ vt[:2])
    assert found.damping == 1e-6


def test_nothing_given_changes_and_factors_share_the_scale() -> None:
    weight, _, xx = problem(6, 8, 40)
    kept = weight.clone(), xx.clone()
    found = truncate(weight, xx, 3)
    assert torch.equal(weight, kept[0])
    assert torch.equal(xx, kept[1])
    sigma = torch.linalg.svdvals(weight @ torch.linalg.cholesky(xx))[:3]
    torch.testing.assert_close(found.left.square().sum(0), sigma)


def test_refusals() -> None:
    weight, _, xx = problem(4, 6, 20)
    for rank in (0, 5):
        with pytest.raises(ParameterError, match="1 to 4"):
            truncate(weight, xx, rank)
    xx[2, 3] = torch.nan
    with pytest.raises(NonFiniteLoss, match="not finite"):
        truncate(weight, xx, 2)
