from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.bias import affine_repair, mean_replacement
from ffprune.core.errors import ParameterError
from ffprune.core.gram import Gram
from ffprune.core.ridge import repair
from tests.oracles import bias as oracle


def problem(n: int, d_out: int = 4, tokens: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """Weight, correlated inputs with means of their own, and their Gram, all float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64)
    x = x @ (torch.eye(n) + torch.randn(n, n, generator=draw, dtype=torch.float64) / n**0.5)
    x = x + 2 * torch.randn(n, generator=draw, dtype=torch.float64)
    gram = Gram(n, x.T @ x, x.square().sum(0), x.sum(0), tokens)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), x, gram


def error(weight: Tensor, x: Tensor, kept: Tensor, found: Tensor, bias: Tensor) -> float:
    return float((x @ weight.T - x[:, kept] @ found.T - bias).square().sum())


shapes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000))


@settings(deadline=None, max_examples=60)
@given(shapes, st.data(), st.floats(1e-3, 1.0), st.booleans())
def test_affine_repair_is_least_squares_with_an_intercept(
    shape: tuple[int, int, int, int], data: st.DataObject, damping: float, absolute: bool
) -> None:
    n, d_out, tokens, seed = shape
    weight, x, gram = problem(n, d_out, tokens, seed)
    kept = torch.tensor(data.draw(st.permutations(range(n))))[: data.draw(st.integers(1, n))]
    strength = damping if absolute else damping * float((x - x.mean(0)).square().sum() / n)
    found, bias = affine_repair(weight, gram, kept, damping, absolute)
    expected = oracle.affine(weight.numpy(), x.numpy(), kept.tolist(), strength)
    torch.testing.assert_close(found, torch.from_numpy(expected[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, torch.from_numpy(expected[1]), rtol=1e-5, atol=1e-6)


def test_the_bias_of_pruned_columns_is_their_mean_output() -> None:
    weight, x, gram = problem(6)
    kept = torch.tensor([4, 1])
    pruned = [0, 2, 3, 5]
    expected = (x[:, pruned] @ weight[:, pruned].T).mean(0)
    torch.testing.assert_close(mean_replacement(weight, gram.mean, kept), expected)
    assert not mean_replacement(weight, gram.mean, torch.arange(6)).any()


def test_either_bias_makes_the_mean_output_exact() -> None:
    weight, x, gram = problem(7)
    kept = torch.tensor([6, 0, 3])
    dense = (x @ weight.T).mean(0)
    bias = mean_replacement(weight, gram.mean, kept)
    torch.testing.assert_close((x[:, kept] @ weight[:, kept].T).mean(0) + bias, dense)
    repaired, bias = affine_repair(weight, gram, kept, 0.3)
    torch.testing.assert_close((x[:, kept] @ repaired.T).mean(0) + bias, dense)


def test_every_step_of_the_repair_lowers_the_error() -> None:
    weight, x, gram = problem(10)
    assert gram.xx is not None
    kept, none = torch.tensor([0, 1, 2, 3, 4, 5]), torch.zeros(4, dtype=torch.float64)
    cut = error(weight, x, kept, weight[:, kept], none)
    mean = error(weight, x, kept, weight[:, kept], mean_replacement(weight, gram.mean, kept))
    ridge = error(weight, x, kept, repair(weight, gram.xx, kept, 1e-6), none)
    both = error(weight, x, kept, *affine_repair(weight, gram, kept, 1e-6))
    assert both < ridge < cut
    assert both < mean < cut


def test_heavy_damping_leaves_the_mean_replacement_alone() -> None:
    weight, _, gram = problem(8)
    kept = torch.tensor([7, 2, 5])
    found, bias = affine_repair(weight, gram, kept, 1e9)
    torch.testing.assert_close(found, weight[:, kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, mean_replacement(weight, gram.mean, kept), rtol=1e-6, atol=1e-6)


def test_nothing_pruned_changes_nothing() -> None:
    weight, _, gram = problem(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    found, bias = affine_repair(weight, gram, order, 0.01)
    assert torch.equal(found, weight[:, order])
    assert not bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_have_the_weights_dtype_and_inputs_stay(dtype: torch.dtype) -> None:
    weight, _, gram = problem(6)
    assert gram.xx is not None
    weight, kept, mean = weight.to(dtype), torch.tensor([1, 4]), gram.mean
    before = weight.clone(), mean.clone(), gram.xx.clone(), gram.total.clone()
    bias = mean_replacement(weight, mean, kept)
    found, affine = affine_repair(weight, gram, kept, 0.01)
    assert bias.dtype == found.dtype == affine.dtype == dtype
    wide = affine_repair(weight.double(), gram, kept, 0.01)
    assert torch.equal(found, wide[0].to(dtype))
    assert torch.equal(affine, wide[1].to(dtype))
    for now, then in zip((weight, mean, gram.xx, gram.total), before, strict=True):
        assert torch.equal(now, then)


def test_a_gram_of_the_diagonal_alone_and_negative_damping_are_refused() -> None:
    weight, x, gram = problem(4)
    with pytest.raises(ValueError, match="diagonal only"):
        affine_repair(weight, Gram.zeros(4, full=False).update(x), torch.tensor([0]), 0.01)
    with pytest.raises(ParameterError, match=r"damping -1"):
        affine_repair(weight, gram, torch.tensor([0]), -1.0)
