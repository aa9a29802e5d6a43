from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.core.errors import ParameterError
from ffprune.core.gram import Gram, block_dampings, damped
from tests.oracles import gram as oracle

torch.set_num_threads(1)


def tokens(count: int, n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed)) + torch.arange(n)


def assert_same(a: Gram, b: Gram) -> None:
    assert a.count == b.count
    assert a.xx is not None
    assert b.xx is not None
    for left, right in ((a.xx, b.xx), (a.diag, b.diag), (a.total, b.total)):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_streamed_moments_equal_all_at_once() -> None:
    x = tokens(60)
    gram = Gram.zeros(5, full=True)
    for part in x.split([1, 20, 39]):
        assert gram.update(part) is gram
    expected = oracle.moments(x)
    assert gram.xx is not None
    assert gram.count == 60
    torch.testing.assert_close(gram.xx.double(), expected["xx"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram.diag, expected["xx"].diagonal(), rtol=1e-6, atol=1e-5)
    for name in ("mean", "second_moment", "variance"):
        torch.testing.assert_close(getattr(gram, name), expected[name], rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_tokens_and_grad_is_ignored() -> None:
    x = tokens(24).requires_grad_()
    assert_same(Gram.zeros(5, True).update(x.view(2, 3, 4, 5)), Gram.zeros(5, True).update(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = tokens(2000).to(dtype)
    gram = Gram.zeros(5, full=True).update(x)
    assert gram.xx is not None
    assert (gram.xx.dtype, gram.diag.dtype, gram.total.dtype) == (torch.float32, torch.float64, torch.float64)
    torch.testing.assert_close(gram.xx.double(), oracle.moments(x)["xx"], rtol=1e-4, atol=1e-2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_merge_is_order_free(counts: list[int], random: object) -> None:
    parts = [Gram.zeros(5, True).update(tokens(count, seed=i)) for i, count in enumerate(counts)]
    forward = functools.reduce(Gram.merge, parts)
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert_same(forward, functools.reduce(Gram.merge, parts))
    everything = torch.cat([tokens(count, seed=i) for i, count in enumerate(counts)])
    assert_same(forward, Gram.zeros(5, True).update(everything))


def test_merge_changes_neither_side() -> None:
    a, b = Gram.zeros(5, False).update(tokens(3)), Gram.zeros(5, False).update(tokens(4, seed=1))
    before = a.diag.clone(), b.diag.clone()
    assert a.merge(b).count == 7
    assert (a.count, b.count) == (3, 4)
    assert torch.equal(a.diag, before[0])
    assert torch.equal(b.diag, before[1])


def test_diagonal_gram_keeps_no_matrix() -> None:
    gram = Gram.zeros(5, full=False).update(tokens(9))
    assert gram.xx is None
    torch.testing.assert_close(gram.variance, oracle.moments(tokens(9))["variance"], rtol=1e-5, atol=1e-5)


def test_constant_input_has_no_negative_variance() -> None:
    assert (Gram.zeros(2, False).update(torch.full((1000, 2), 0.1)).variance >= 0).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="width 5"):
        Gram.zeros(5, False).update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="cannot merge"):
        Gram.zeros(5, False).merge(Gram.zeros(5, True))
    with pytest.raises(ValueError, match="cannot merge"):
        Gram.zeros(5, True).merge(Gram.zeros(4, True))
    with pytest.raises(ValueError, match="no tokens"):
        _ = Gram.zeros(5, False).mean


def test_damping_is_relative_to_the_mean_diagonal_or_absolute() -> None:
    xx = torch.tensor([[1.0, 2.0], [2.0, 7.0]])
    torch.testing.assert_close(damped(xx, 0.5), torch.tensor([[3.0, 2.0], [2.0, 9.0]]))
    torch.testing.assert_close(damped(xx, 0.5, absolute=True), torch.tensor([[1.5, 2.0], [2.0, 7.5]]))
    torch.testing.assert_close(xx, torch.tensor([[1.0, 2.0], [2.0, 7.0]]))
    with pytest.raises(ParameterError, match=r"damping -0.1"):
        damped(xx, -0.1)


@pytest.mark.parametrize("full", [True, False])
def test_blocks_are_those_of_the_whole_gram(full: bool) -> None:
    """Of tokens that are zero outside of the blocks that they are in."""
    generator = torch.Generator().manual_seed(6)
    whole, blocks = Gram.zeros(12, True), Gram.zeros(12, full, blocks=3)
    for _ in range(2):
        tokens = torch.randn(8, 3, 4, generator=generator)
        inside = torch.rand(8, 3, generator=generator) < 0.6
        inside[:, 1] = False
        whole.update((tokens * inside[..., None]).flatten(1))
        blocks.update_blocks([tokens[inside[:, i], i] for i in range(3)], 8)
    assert blocks.count == whole.count == 16
    for mine, other in ((blocks.diag, whole.diag), (blocks.mean, whole.mean), (blocks.variance, whole.variance)):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    if full:
        torch.testing.assert_close(blocks.xx, torch.stack([whole.xx[i : i + 4, i : i + 4] for i in (0, 4, 8)]))
        assert block_dampings(blocks.xx, 0.1)[1] is None
        strengths = [
            share * float(block.diagonal().mean())
            for share, block in zip(block_dampings(blocks.xx, 0.1), blocks.xx, strict=True)
            if share is not None
        ]
        assert strengths == pytest.approx([0.1 * float(blocks.diag.mean())] * 2)
