from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.gram import damped
from ffprune.core.saliency import SALIENCIES
from ffprune.core.sparsegpt import reconstruct
from tests.oracles import sparsegpt as oracle

DAMPING = 0.01


def problem(n: int, d_out: int = 5, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs of uneven sizes, and their Gram, float64."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64) @ (mixing / n**0.5 + torch.eye(n))
    x = x * torch.rand(n, generator=draw, dtype=torch.float64).add(0.2)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), x, x.T @ x


def twin(
    weight: Tensor, xx: Tensor, kept: int, name: str, block: int, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    return oracle.reconstruct(weight, xx, damped(xx, DAMPING), kept, name, block, pattern)


@pytest.mark.parametrize("block", [1, 4, 5, 12, 128])
@pytest.mark.parametrize("name", SALIENCIES)
def test_blocks_equal_obs_one_weight_at_a_time(name: str, block: int) -> None:
    weight, _, xx = problem(12)
    for kept in (17, 30, 45):
        found = reconstruct(weight, xx, kept, name, block=block)
        repaired, stays = twin(weight, xx, kept, name, block)
        assert torch.equal(found.mask, stays)
        torch.testing.assert_close(found.weight, repaired, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 10), st.data())
def test_blocks_equal_obs_for_any_shape(n: int, d_out: int, tokens: int, block: int, data: st.DataObject) -> None:
    # Fewer tokens than inputs too: only the damping makes the Gram invertible then.
    weight, _, xx = problem(n, d_out, tokens, data.draw(st.integers(0, 99)))
    kept = data.draw(st.integers(0, weight.numel()))
    found = reconstruct(weight, xx, kept, block=block)
    repaired, stays = twin(weight, xx, kept, "obs", block)
    assert int(found.mask.sum()) == kept
    assert torch.equal(found.mask, stays)
    torch.testing.assert_close(found.weight, repaired, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("stay", "group"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("name", SALIENCIES)
def test_patterns_equal_obs_one_weight_at_a_time(name: str, stay: int, group: int) -> None:
    weight, _, xx = problem(16)
    kept = weight.numel() // group * stay
    repaired, stays = twin(weight, xx, kept, name, 0, (stay, group))
    assert (stays.view(-1, group).sum(1) == stay).all()
    # Blocks are only a matter of speed here, since groups choose for themselves.
    for block in (8, 16, 128):
        found = reconstruct(weight, xx, kept, name, f"{stay}:{group}", block)
        assert torch.equal(found.mask, stays)
        torch.testing.assert_close(found.weight, repaired, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 14), st.sampled_from(sorted(SALIENCIES)), st.data())
def test_the_count_is_exact_whatever_the_ties(d_out: int, n: int, block: int, name: str, data: st.DataObject) -> None:
    weight = torch.randint(-1, 2, (d_out, n), generator=torch.Generator().manual_seed(n)).float()
    xx = torch.eye(n) * data.draw(st.sampled_from([0.0, 1.0]))
    kept = data.draw(st.integers(0, d_out * n))
    found = reconstruct(weight, xx, kept, name, block=block)
    assert int(found.mask.sum()) == kept
    assert (found.weight[~found.mask] == 0).all()
    # Blocks differ by less than one weight from their share.
    for start in range(0, n, block):
        part = found.mask[:, start : start + block]
        assert abs(int(part.sum()) - kept * part.shape[1] / n) < 1


@pytest.mark.parametrize("name", SALIENCIES)
def test_the_error_is_the_damped_objective_and_repair_lowers_the_real_one(name: str) -> None:
    weight, x, xx = problem(40, d_out=8, tokens=200)
    found = reconstruct(weight, xx, 160, name, block=16)
    change = found.weight - weight
    assert found.error == pytest.approx(float((change @ damped(xx, DAMPING) @ change.T).trace()), rel=1e-9)
    mended, cut = (x @ change.T).square().sum(), (x @ (weight * ~found.mask).T).square().sum()
    assert mended < 0.8 * cut


def test_isc_chooses_by_both_errors() -> None:
    weight, _, xx = problem(40)
    masks = [reconstruct(weight, xx, 100, name).mask for name in ("obs", "obd", "isc")]
    assert not torch.equal(masks[2], masks[0])
    assert not torch.equal(masks[2], masks[1])


def test_wanda_and_obd_choose_alike_where_rows_compare() -> None:
    weight, _, xx = problem(20)
    wanda, obd = (reconstruct(weight, xx, 50, name, block=8) for name in ("wanda", "obd"))
    assert torch.equal(wanda.mask, obd.mask)


def test_everything_or_nothing_kept() -> None:
    weight, _, xx = problem(10)
    everything, nothing = (reconstruct(weight, xx, kept, block=4) for kept in (50, 0))
    assert torch.equal(everything.weight, weight)
    assert everything.mask.all()
    assert everything.error == 0
    assert (nothing.weight == 0).all()
    assert nothing.error == pytest.approx(float((weight @ damped(xx, DAMPING) @ weight.T).trace()))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_dead_inputs_lose_their_weights_and_change_nothing_else(pattern: str | None) -> None:
    weight, _, xx = problem(12)
    dead = [1, 5, 6]
    xx[dead, :] = 0
    xx[:, dead] = 0
    found = reconstruct(weight, xx, 30, pattern=pattern, block=4)
    assert (found.weight[:, dead] == 0).all()
    assert int(found.mask.sum()) == 30
    other = weight.clone()
    other[:, dead] = 1e6
    assert torch.equal(reconstruct(other, xx, 30, pattern=pattern, block=4).weight, found.weight)
    revived = xx.clone()
    revived[dead, dead] = 1
    change = found.weight - weight
    change[:, dead] = 0
    assert found.error == pytest.approx(float((change @ damped(revived, DAMPING) @ change.T).trace()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_answer_has_the_weights_dtype_and_inputs_stay(dtype: torch.dtype) -> None:
    weight, _, xx = problem(24)
    given, single = torch.nn.Parameter(weight.to(dtype)), xx.float()
    before = given.detach().clone(), single.clone()
    found = reconstruct(given, single, 60, block=8)
    assert found.weight.dtype == dtype
    assert found.mask.dtype == torch.bool
    assert found.weight.is_contiguous()
    assert found.mask.is_contiguous()
    assert not found.weight.requires_grad
    assert torch.equal(given.detach(), before[0])
    assert torch.equal(single, before[1])
    exact = reconstruct(given.double(), single.double(), 60, block=8)
    assert torch.equal(found.mask, exact.mask)
    torch.testing.assert_close(
        found.weight, exact.weight.to(dtype), rtol=1.6e-2 if dtype != torch.float32 else 1e-4, atol=1e-4
    )


def test_a_raised_damping_is_in_the_result() -> None:
    # Eigenvalues 2.05 and -0.05: damping 0.01 is too little, 0.1 is enough.
    xx = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    found = reconstruct(torch.tensor([[1.0, 2.0]]), xx, 1)
    assert found.damping == pytest.approx(0.1)
    assert torch.equal(found.weight, reconstruct(torch.tensor([[1.0, 2.0]]), xx, 1, damping=found.damping).weight)
    assert reconstruct(torch.tensor([[1.0, 2.0]]), torch.eye(2), 1).damping == 0.01
    with pytest.raises(ParameterError, match="no Cholesky factor with any damping up to 1"):
        reconstruct(torch.tensor([[1.0, 2.0]]), -xx, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"saliency": "magic"}, "Known names: isc, magnitude, obd, obs, wanda"),
        ({"pattern": "2:5"}, "2:5 was asked for a matrix of 12 inputs"),
        ({"pattern": "2:4", "block": 6}, "multiple of 4"),
        ({"pattern": "1:4"}, "keeps exactly 9.*sparsity to 0.75"),
        ({"damping": -1.0}, "damping -1.0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    weight, _, xx = problem(12, d_out=3)
    with pytest.raises(ParameterError, match=message):
        reconstruct(weight, xx, 18, **arguments)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    weight, _, xx = problem(12, d_out=3)
    for kept in (-1, 37):
        with pytest.raises(ValueError, match="cannot stay"):
            reconstruct(weight, xx, kept)
    with pytest.raises(ValueError, match="12 inputs"):
        reconstruct(weight, xx[:11, :11], 18)
    weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        reconstruct(weight, xx, 18)
