from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.ridge import repair
from ffprune.core.stream import DAMPINGS, Moments, repair_towards


def problem(n: int, d_out: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs and wishes, float32."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + torch.randn(n, n, generator=draw) / n**0.5
    x = torch.randn(tokens, n, generator=draw) @ mix
    return torch.randn(d_out, n, generator=draw), x, torch.randn(tokens, d_out, generator=draw)


def moments(x: Tensor, e: Tensor) -> Moments:
    found = Moments.zeros(x.shape[1], e.shape[1])
    found.update(x, e)
    return found


def least_squares(weight: Tensor, x: Tensor, e: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The twin: rows of tokens, and one row more per column for lambda, solved as they stand."""
    x, e, weight = x.double(), e.double(), weight.double()
    strength = damping * float(x.square().sum() / x.shape[1])
    rows = torch.cat([x[:, kept], strength**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    wanted = torch.cat([x @ weight.T + e, strength**0.5 * weight[:, kept].T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 10), st.integers(1, 5), st.integers(12, 40), st.integers(0, 999), st.data())
def test_it_is_least_squares_of_the_target(n: int, d_out: int, tokens: int, seed: int, data: st.DataObject) -> None:
    weight, x, e = problem(n, d_out, tokens, seed)
    kept = torch.tensor(data.draw(st.permutations(range(n))))[: data.draw(st.integers(1, n))]
    found, damping = repair_towards(weight, moments(x, e), Moments.zeros(n, d_out), kept, 0.05)
    assert damping == 0.05
    torch.testing.assert_close(found.double(), least_squares(weight, x, e, kept, 0.05), rtol=1e-3, atol=1e-3)


def test_with_no_wish_left_it_is_ridge_repair() -> None:
    weight, x, e = problem(8, 3, 30, 0)
    kept = torch.tensor([5, 0, 2])
    found, _ = repair_towards(weight, moments(x, 0 * e), Moments.zeros(8, 3), kept, 0.01)
    torch.testing.assert_close(found, repair(weight, x.T @ x, kept, 0.01), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_lambda_is_the_one_that_held_out_tokens_like_best(noise: float) -> None:
    weight, x, e = problem(10, 4, 24, 1)
    _, unseen, other = problem(10, 4, 24, 2)
    kept = torch.arange(7)
    pairs = [(x, noise * e), (unseen, noise * other)]
    found, damping = repair_towards(weight, *(moments(*pair) for pair in pairs), kept, 0.01)

    def error(strength: float) -> float:
        learnt = least_squares(weight, *pairs[0], kept, strength)
        target = pairs[1][0].double() @ weight.double().T + pairs[1][1].double()
        return float((target - pairs[1][0][:, kept].double() @ learnt.T).square().sum())

    assert damping == min(DAMPINGS, key=error)
    both = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    torch.testing.assert_close(found.double(), least_squares(weight, *both, kept, damping), rtol=1e-3, atol=1e-3)
