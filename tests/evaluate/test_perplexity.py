"""Perplexity against plain cross-entropy in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ffprune.core.errors import NonFiniteLoss, ParameterError, UnsupportedArchitecture
from ffprune.evaluate.logits import assert_head_is_known
from ffprune.evaluate.perplexity import perplexity, summarise, token_nll
from tests.tiny import VOCAB, llama, spread


def slow_nll(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """One window at a time, whole logits, float64 throughout."""
    twin = model.double()
    rows = []
    with torch.no_grad():
        for window in windows:
            logits = twin(input_ids=window[None]).logits[0]
            rows.append(cross_entropy(logits[:-1], window[1:], reduction="none"))
    return torch.stack(rows)


def test_token_nll_is_cross_entropy(model: PreTrainedModel, windows: Tensor) -> None:
    fast = token_nll(model, windows, batch_size=2)
    assert fast.shape == (5, 16) and fast.dtype == torch.float32
    assert not fast.is_inference()
    torch.testing.assert_close(fast.double(), slow_nll(model, windows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_rows", [1, 7, 33, 512])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_slicing_changes_nothing(
    small_llama: PreTrainedModel, windows: Tensor, head_rows: int, batch_size: int
) -> None:
    whole = token_nll(small_llama, windows, batch_size=5)
    sliced = token_nll(small_llama, windows, batch_size, head_rows=head_rows)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


def test_bf16_logits_are_reduced_in_float32(small_llama: PreTrainedModel, windows: Tensor) -> None:
    model = small_llama.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    expected = cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(token_nll(model, windows, 5).double(), expected, rtol=0, atol=1e-5)


def test_perplexity_states_what_it_was_measured_on(small_llama: PreTrainedModel, windows: Tensor) -> None:
    result = perplexity(small_llama, windows, batch_size=2)
    slow = slow_nll(small_llama, windows)
    assert (result.windows, result.seqlen, result.tokens, result.finite) == (5, 17, 80, True)
    assert result.nll_mean == pytest.approx(float(slow.mean()), abs=1e-5)
    assert result.value == pytest.approx(math.exp(float(slow.mean())), rel=1e-5)
    assert result.stderr == pytest.approx(float(slow.mean(1).std()) / math.sqrt(5), rel=1e-4)


def test_one_window_has_no_standard_error(small_llama: PreTrainedModel, windows: Tensor) -> None:
    assert perplexity(small_llama, windows[:1], batch_size=2).stderr is None


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_broken_model_is_reported_or_refused(small_llama: PreTrainedModel, windows: Tensor, poison: float) -> None:
    with torch.no_grad():
        small_llama.get_input_embeddings().weight[0, 0] = poison
    result = perplexity(small_llama, windows, batch_size=2)
    assert (result.value, result.nll_mean, result.stderr, result.finite) == (math.inf, math.inf, None, False)
    with pytest.raises(NonFiniteLoss, match="5 windows of 17 tokens"):
        perplexity(small_llama, windows, batch_size=2, require_finite=True)


def test_huge_loss_overflows_to_inf() -> None:
    result = summarise(torch.full((2, 3), 800.0))
    assert (result.value, result.nll_mean, result.finite) == (math.inf, 800.0, False)


def test_progress_and_mode(small_llama: PreTrainedModel, windows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    small_llama.train()
    token_nll(small_llama, windows, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert small_llama.training


def test_dropout_is_off(windows: Tensor, model: PreTrainedModel) -> None:
    model.train()
    assert torch.equal(token_nll(model, windows, 5), token_nll(model, windows, 5))


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**SIZES, logits_scaling=1.7), Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5)],
    ids=["scaled", "soft-capped"],
)
def test_last_steps_behind_the_head_count(config: PretrainedConfig, windows: Tensor) -> None:
    model = spread(AutoModelForCausalLM.from_config(config))
    assert_head_is_known(model.to(torch.bfloat16))
    model = spread(AutoModelForCausalLM.from_config(config))
    fast = token_nll(model, windows, 2, head_rows=7)
    torch.testing.assert_close(fast.double(), slow_nll(model, windows), rtol=0, atol=1e-5)


def test_an_unknown_last_step_is_refused() -> None:
    model = spread(AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=1.01)))
    with pytest.raises(UnsupportedArchitecture, match="CohereForCausalLM"):
        assert_head_is_known(model)
    with pytest.raises(UnsupportedArchitecture):
        token_nll(model, torch.zeros(1, 4, dtype=torch.long), 1)


def test_plain_heads_pass(model: PreTrainedModel) -> None:
    assert_head_is_known(model)
    assert_head_is_known(model.to(torch.bfloat16))


@pytest.mark.parametrize(("shape", "batch", "rows"), [((0, 4), 1, 1), ((2, 1), 1, 1), ((2, 4), 0, 1), ((2, 4), 1, 0)])
def test_senseless_shapes(shape: tuple[int, int], batch: int, rows: int) -> None:
    with pytest.raises(ParameterError):
        token_nll(llama(), torch.zeros(shape, dtype=torch.long), batch, head_rows=rows)
