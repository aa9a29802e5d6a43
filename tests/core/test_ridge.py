from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.ridge import PrefixRidge, repair
from tests.oracles import ridge as oracle


def problem(n: int, d_out: int = 4, tokens: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs and their Gram, float64; channels are correlated."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64)
    x = x @ (torch.eye(n) + torch.randn(n, n, generator=draw, dtype=torch.float64) / n**0.5)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), x, x.T @ x


shapes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000))


@settings(deadline=None, max_examples=60)
@given(shapes, st.data(), st.floats(1e-3, 1.0), st.booleans())
def test_repair_is_least_squares_with_augmented_rows(
    shape: tuple[int, int, int, int], data: st.DataObject, damping: float, absolute: bool
) -> None:
    n, d_out, tokens, seed = shape
    weight, x, xx = problem(n, d_out, tokens, seed)
    kept = torch.tensor(data.draw(st.permutations(range(n))))[: data.draw(st.integers(1, n))]
    strength = damping if absolute else damping * float(xx.diagonal().mean())
    found = repair(weight, xx, kept, damping, absolute)
    expected = oracle.lstsq(weight, x, kept, strength)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_relative_damping_follows_the_scale_and_absolute_does_not() -> None:
    weight, _, xx = problem(6)
    kept = torch.tensor([0, 2, 5])
    torch.testing.assert_close(repair(weight, xx, kept, 0.1), repair(weight, 100 * xx, kept, 0.1))
    one, other = (repair(weight, scale * xx, kept, 5.0, absolute=True) for scale in (1, 100))
    assert not torch.allclose(one, other, rtol=1e-3)
    strength = 0.1 * float(xx.diagonal().mean())
    torch.testing.assert_close(repair(weight, xx, kept, 0.1), repair(weight, xx, kept, strength, absolute=True))


def test_nothing_removed_changes_nothing_and_copies() -> None:
    weight, _, xx = problem(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = repair(weight, xx, order, 0.01)
    assert torch.equal(found, weight[:, order])
    found.zero_()
    assert weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_answer_has_the_weights_dtype_and_float64_accuracy(dtype: torch.dtype) -> None:
    weight, _, xx = problem(8)
    weight, kept = weight.to(dtype), torch.tensor([1, 3, 4])
    found = repair(weight, xx.float(), kept, 0.01)
    assert found.dtype == dtype
    assert torch.equal(found, repair(weight.double(), xx.float().double(), kept, 0.01).to(dtype))


def test_the_repair_lowers_the_output_error() -> None:
    weight, x, xx = problem(10)
    kept = torch.tensor([0, 1, 2, 3, 4, 5])
    dense = x @ weight.T
    cut = (dense - x[:, kept] @ weight[:, kept].T).square().sum()
    mended = (dense - x[:, kept] @ repair(weight, xx, kept, 0.01).T).square().sum()
    assert mended < 0.8 * cut


@settings(deadline=None, max_examples=40)
@given(shapes, st.data(), st.floats(3e-3, 1.0))
def test_one_factor_serves_every_prefix(shape: tuple[int, int, int, int], data: st.DataObject, damping: float) -> None:
    n, d_out, tokens, seed = shape
    weight, _, xx = problem(n, d_out, tokens, seed)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    ridge = PrefixRidge.prepare(weight, xx, order, damping)
    for k in range(1, n + 1):
        found = ridge.at(k)
        assert found.dtype == torch.float32
        assert found.shape == (d_out, k)
        # Lambda is relative to the whole diagonal, kept and removed, in both.
        torch.testing.assert_close(found.double(), repair(weight, xx, order[:k], damping), rtol=1e-3, atol=1e-4)
        for j in range(1, k):
            torch.testing.assert_close(ridge.extend(ridge.at(j), k), found, rtol=1e-3, atol=1e-4)
    assert torch.equal(ridge.at(n), weight[:, order].float())


def test_keeping_nothing_leaves_an_empty_map() -> None:
    weight, _, xx = problem(4)
    assert repair(weight, xx, torch.tensor([], dtype=torch.int64), 0.01).shape == (4, 0)
    assert PrefixRidge.prepare(weight, xx, torch.arange(4), 0.01).at(0).shape == (4, 0)


def test_inputs_are_not_changed() -> None:
    weight, _, xx = problem(6)
    weight, xx = weight.float(), xx.float()
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    before = weight.clone(), xx.clone(), order.clone()
    repair(weight, xx, order[:3], 0.01)
    ridge = PrefixRidge.prepare(weight, xx, order, 0.01)
    parts = ridge.weight.clone(), ridge.factor.clone(), ridge.product.clone()
    for k in range(1, 7):
        ridge.at(k)
    for now, then in zip((weight, xx, order), before, strict=True):
        assert torch.equal(now, then)
    for now, then in zip((ridge.weight, ridge.factor, ridge.product), parts, strict=True):
        assert torch.equal(now, then)


def test_negative_damping_is_refused() -> None:
    weight, _, xx = problem(4)
    with pytest.raises(ParameterError, match=r"damping -1"):
        repair(weight, xx, torch.tensor([0]), -1.0)
