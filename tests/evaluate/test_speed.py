"""Speed: positive, in turns, relative to the first model."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError
from ffprune.evaluate.logits import last_logits
from ffprune.evaluate.speed import measure
from tests.tiny import MODELS, llama


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_timed(name: str) -> None:
    result = measure({"dense": MODELS[name]()}, prefill_tokens=8, decode_tokens=3, batch=2, repeats=2)["dense"]
    assert result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0
    assert result.prefill_ratios == result.decode_ratios == (1.0, 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_prefill_gives_the_logits_behind_the_last_token(name: str) -> None:
    model, tokens = MODELS[name]().eval(), torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert torch.allclose(last_logits(model, tokens), model(tokens).logits[:, -1], atol=1e-5)


def test_models_take_turns_after_a_warm_up() -> None:
    calls: list[tuple[str, int]] = []
    models = {name: llama() for name in "abc"}
    for name, model in models.items():
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, kwargs["input_ids"].shape[1])),
            with_kwargs=True,
        )
    seen: list[tuple[int, int]] = []
    results = measure(models, 16, decode_tokens=2, repeats=3, progress=lambda done, total: seen.append((done, total)))
    prefills = [name for name, length in calls if length == 16]
    assert prefills == list("abc" * 4)  # a warm-up round and three timed ones
    turn = [("a", 16), ("a", 8), ("a", 1), ("a", 1)]
    assert calls[-12:-8] == turn
    assert seen == [(i, 9) for i in range(1, 10)]
    for result in results.values():
        assert len(result.prefill_ratios) == len(result.decode_ratios) == 3
        assert result.prefill_over_dense == statistics.median(result.prefill_ratios)
        assert result.decode_over_dense == statistics.median(result.decode_ratios)
    assert results["a"].prefill_over_dense == results["a"].decode_over_dense == 1.0


def test_a_loader_is_called_for_every_turn() -> None:
    loaded = 0

    def load() -> PreTrainedModel:
        nonlocal loaded
        loaded += 1
        return llama()

    measure({"dense": llama(), "pruned": load}, 8, 2, repeats=3)
    assert loaded == 3


def test_decoding_is_greedy_with_a_cache(small_llama: PreTrainedModel) -> None:
    fed: list[torch.Tensor] = []
    small_llama.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    measure({"dense": small_llama}, 4, decode_tokens=5, repeats=1)
    sequence = torch.cat(fed[-6:], dim=1)
    for length in range(8, 13):
        with torch.no_grad():
            assert small_llama(input_ids=sequence[:, :length]).logits[0, -1].argmax() == sequence[0, length]


def test_models_are_left_as_they_were() -> None:
    model = llama().train()
    measure({"dense": model}, 4, 2, repeats=1)
    assert model.training


def test_nothing_to_time() -> None:
    with pytest.raises(ParameterError):
        measure({})
    with pytest.raises(ParameterError, match="0 times"):
        measure({"dense": llama()}, repeats=0)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"1025 tokens was asked for.*context is 1024 tokens"):
        measure({"dense": llama()}, 1025, 1, 1)
