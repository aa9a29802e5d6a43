from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.gptq import Quantised, bits_per_weight, compression_ratio, quantise
from ffprune.core.gram import damped
from tests.oracles import gptq as oracle

DAMPING = 0.01


def problem(n: int, d_out: int = 5, tokens: int = 80, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, correlated inputs of uneven sizes and their Gram, float64."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64) @ (mixing / n**0.5 + torch.eye(n))
    x = x * torch.rand(n, generator=draw, dtype=torch.float64).add(0.2)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), x, x.T @ x


def strongly_correlated(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`problem`, 16 rows of 64, with inputs that follow a few common causes, as activations do."""
    draw = torch.Generator().manual_seed(seed)
    causes = torch.randn(400, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 64, generator=draw).double()
    x = causes + torch.randn(400, 64, generator=draw, dtype=torch.float64)
    return torch.randn(16, 64, generator=draw, dtype=torch.float64), x, x.T @ x


def half(shape: torch.Size, seed: int = 1) -> Tensor:
    """A mask of about one half."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def per_column(found: Quantised) -> tuple[Tensor, Tensor]:
    """Scale and zero of every column, float64 ``[d_out, n]``."""
    width = found.weight.shape[1] // found.scale.shape[1]
    return tuple(grid.double().repeat_interleave(width, 1) for grid in (found.scale, found.zero))  # type: ignore[return-value]


def to_nearest(weight: Tensor, found: Quantised) -> Tensor:
    """Every weight to the nearest point of the grid that was found, no error made up for."""
    scale, zero = per_column(found)
    return (((weight.double() / scale).round() + zero).clamp(0, 2**found.bits - 1) - zero) * scale


def check_on_grid(found: Quantised) -> None:
    scale, zero = per_column(found)
    code = (found.weight.double() / scale).round() + zero
    assert code.min() >= 0
    assert code.max() <= 2**found.bits - 1
    assert torch.equal(((code - zero) * scale).to(found.weight.dtype), found.weight)
    for group in found.weight.chunk(found.scale.shape[1], 1):
        assert all(len(row.unique()) <= 2**found.bits for row in group)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 1000))


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(2, 8), st.sampled_from([1, 2, 3, 128]), st.booleans())
def test_it_is_optimal_brain_surgery_one_column_at_a_time(
    shape: tuple[int, int, int, int, int], bits: int, block: int, masked: bool
) -> None:
    groups, width, d_out, tokens, seed = shape
    weight, x, xx = problem(groups * width, d_out, tokens, seed)
    kept = half(weight.shape, seed) if masked else torch.ones_like(weight, dtype=torch.bool)
    found = quantise(weight, xx, bits, width, kept if masked else None, DAMPING, block)
    expected = oracle.quantise(weight, damped(xx, DAMPING), bits, width, kept)
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-7)
    assert found.error == pytest.approx(oracle.output_error(weight, found.weight, x), rel=1e-6, abs=1e-9)
    assert found.damping == DAMPING
    assert (found.scale.shape, found.zero.shape) == ((d_out, groups), (d_out, groups))


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(2, 8), st.floats(-3, 3), st.sampled_from([torch.float64, torch.float32]))
def test_weights_lie_on_the_grid_and_pruned_ones_are_zero(
    shape: tuple[int, int, int, int, int], bits: int, shift: float, dtype: torch.dtype
) -> None:
    groups, width, d_out, tokens, seed = shape
    weight, _, xx = problem(groups * width, d_out, tokens, seed)
    kept = half(weight.shape, seed)
    # Shifted, so that in many groups 0 is not between the least and the greatest weight.
    found = quantise(((weight + shift) * kept).to(dtype), xx, bits, width, kept)
    check_on_grid(found)
    assert (found.weight[~kept] == 0).all()


@pytest.mark.parametrize("block", [1, 7, 16, 48, 64])
@pytest.mark.parametrize("group_size", [6, 16, None])
def test_the_block_does_not_change_the_result(block: int, group_size: int | None) -> None:
    weight, _, xx = problem(48)
    kept = half(weight.shape)
    expected = quantise(weight, xx, 3, group_size, kept)
    found = quantise(weight, xx, 3, group_size, kept, block=block)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_less_than_that_of_rounding_to_the_same_grid(bits: int, seed: int) -> None:
    weight, x, xx = strongly_correlated(seed)
    found = quantise(weight, xx, bits, 16)
    assert found.error < 0.8 * oracle.output_error(weight, to_nearest(weight, found), x)
    kept = half(weight.shape, seed)
    found = quantise(weight * kept, xx, bits, 16, kept)
    assert found.error < 0.8 * oracle.output_error(weight * kept, to_nearest(weight * kept, found), x)


def test_more_bits_leave_less_error() -> None:
    weight, _, xx = strongly_correlated()
    errors = [quantise(weight, xx, bits, 16).error for bits in range(2, 9)]
    assert all(finer < 0.5 * coarser for coarser, finer in pairwise(errors))


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight, _, _ = problem(24)
    found = quantise(weight, torch.diag(torch.arange(1.0, 25.0)), 4, 8)
    torch.testing.assert_close(found.weight, to_nearest(weight, found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_lies_on_a_full_grid_stays(bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    width, zero = 2**bits + 3, 2 ** (bits - 1) - 1
    codes = torch.randint(0, 2**bits, (6, 2 * width), generator=draw)
    codes[:, [0, width]], codes[:, [1, width + 1]] = 0, 2**bits - 1
    weight, (_, _, xx) = 0.25 * (codes - zero).float(), problem(2 * width)
    found = quantise(weight, xx, bits, width)
    assert torch.equal(found.weight, weight)
    assert torch.equal(found.scale, torch.full((6, 2), 0.25))
    assert torch.equal(found.zero, torch.full((6, 2), zero))
    assert found.error == 0


def test_a_mask_is_what_keeps_zeros() -> None:
    weight, _, xx = strongly_correlated()
    kept = half(weight.shape)
    sparse = weight * kept
    assert (quantise(sparse, xx, 8, 16).weight[~kept] != 0).any()
    assert (quantise(sparse, xx, 8, 16, kept).weight[~kept] == 0).all()


def test_a_pruned_weight_hands_its_share_of_the_errors_on() -> None:
    # Column 1 is pruned, columns 0 and 2 are nearly equal, column 1 is tied to both: what column 0 lost is made up
    # for by column 2 although the column between them cannot move.
    h = torch.tensor([[1.0, 0.7, 0.95], [0.7, 1.0, 0.7], [0.95, 0.7, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.4, 0.0, 1.0]], dtype=torch.float64)
    kept = torch.tensor([[True, False, True]])
    found = quantise(weight, h, 2, 1, kept, damping=1e-3)
    assert found.error == pytest.approx(0, abs=1e-12)
    found = quantise(weight, h, 2, None, kept, damping=1e-3)
    # Scale 1/3: 0.4 is rounded to 1/3, and column 2, at the end of its grid, cannot take what is missing.
    torch.testing.assert_close(found.weight, torch.tensor([[1 / 3, 0.0, 1.0]], dtype=torch.float64))


def test_dense_values_under_the_mask_are_pruned_with_compensation() -> None:
    weight, x, xx = strongly_correlated()
    kept = half(weight.shape)
    joint = quantise(weight, xx, 8, 16, kept)
    assert (joint.weight[~kept] == 0).all()
    assert joint.error < 0.8 * oracle.output_error(weight, weight * kept, x)


def test_pruned_weights_do_not_widen_the_grid() -> None:
    weight, _, xx = problem(8)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[:, 0] = False
    weight[:, 0] = 100.0
    found = quantise(weight, torch.eye(8), 4, None, kept)
    assert (found.scale < 1).all()
    nothing = quantise(weight, xx, 4, 4, torch.zeros_like(kept))
    assert torch.equal(nothing.weight, torch.zeros_like(weight))
    assert (nothing.scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_answer_has_the_weights_dtype_and_float64_accuracy(dtype: torch.dtype) -> None:
    weight, x, xx = problem(16)
    weight = weight.to(dtype)
    found = quantise(weight, xx.float(), 4, 8)
    assert found.weight.dtype == dtype
    assert found.weight.is_contiguous()
    assert torch.equal(found.weight, quantise(weight.double(), xx.float().double(), 4, 8).weight.to(dtype))
    assert found.error == pytest.approx(oracle.output_error(weight, found.weight, x), rel=1e-4)
    assert (found.scale.dtype, found.zero.dtype) == (torch.float32, torch.int64)


def test_the_scale_of_the_gram_does_not_matter() -> None:
    weight, _, xx = problem(16)
    assert torch.equal(quantise(weight, 1024 * xx, 3, 8).weight, quantise(weight, xx, 3, 8).weight)


def test_damping_is_raised_until_the_gram_has_a_factor_and_reported() -> None:
    weight, x, _ = problem(12, tokens=3)
    singular = x.T @ x
    assert quantise(weight, singular, 4, 4).damping == DAMPING
    found = quantise(weight, singular - 2e-3 * singular.diagonal().mean() * torch.eye(12), 4, 4, damping=1e-3)
    assert found.damping == pytest.approx(1e-2)
    check_on_grid(found)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, _, _ = problem(12)
    found = quantise(weight, torch.zeros(12, 12), 4, 4)
    assert torch.equal(found.weight, to_nearest(weight, found))
    assert (found.error, found.damping) == (0, DAMPING)


def test_what_is_no_gram_is_refused() -> None:
    weight, _, xx = problem(4)
    for wrong in (-xx, xx.index_fill(0, torch.tensor([1]), torch.nan)):
        with pytest.raises(ParameterError, match=r"no Cholesky factor.*activations are finite"):
            quantise(weight, wrong, 4, None)


@pytest.mark.parametrize("shape", [(5, 12), (1, 12), (5, 1)])
def test_inputs_are_not_changed(shape: tuple[int, int]) -> None:
    weight, _, xx = problem(shape[1], shape[0])
    kept = half(weight.shape)
    before = weight.clone(), xx.clone(), kept.clone()
    quantise(weight, xx, 2, None, kept, block=5)
    for now, then in zip((weight, xx, kept), before, strict=True):
        assert torch.equal(now, then)


def test_whole_rows_have_three_names() -> None:
    weight, _, xx = problem(12)
    for group_size in (None, -1, 12):
        assert quantise(weight, xx, 4, group_size).scale.shape == (5, 1)


@pytest.mark.parametrize("bits", [0, 1, 9, 3.5])
def test_bits_that_are_impossible_are_refused(bits: int) -> None:
    weight, _, xx = problem(4)
    with pytest.raises(ParameterError, match=r"bits .* was asked for.*2 to 8"):
        quantise(weight, xx, bits, None)


@pytest.mark.parametrize("group_size", [0, -2])
def test_groups_without_a_column_are_refused(group_size: int) -> None:
    weight, _, xx = problem(12)
    with pytest.raises(ParameterError, match=r"group_size .* was asked for.*1 column or more"):
        quantise(weight, xx, 4, group_size)


def test_the_last_group_takes_the_rest_and_no_row_has_more_than_one_too_many() -> None:
    weight, _, xx = problem(12)
    found = quantise(weight, xx, 2, 5)
    assert found.scale.shape == (5, 3)
    for group in found.weight.split(5, 1):
        assert all(len(row.unique()) <= 4 for row in group)
    torch.testing.assert_close(quantise(weight, xx, 4, 24).weight, quantise(weight, xx, 4, None).weight)


def test_a_mask_of_another_shape_and_negative_damping_are_refused() -> None:
    weight, _, xx = problem(4)
    with pytest.raises(ValueError, match=r"the mask is of shape \(5, 3\)"):
        quantise(weight, xx, 4, None, torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(ParameterError, match=r"damping -1"):
        quantise(weight, xx, 4, None, damping=-1.0)


def test_storage_is_that_of_the_paper() -> None:
    # MS Table 4, column Ratio.
    assert compression_ratio(4, 0.0) == 4.0
    assert round(compression_ratio(3, 0.0), 1) == 5.3
    assert compression_ratio(4, 0.5) == 8.0
    assert compression_ratio(16, 0.5) == 2.0
    assert bits_per_weight(4, 128) == pytest.approx(4.15625)
    assert bits_per_weight(3, 64) == pytest.approx(3.296875)
