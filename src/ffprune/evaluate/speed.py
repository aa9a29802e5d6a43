"""Prefill and decode speed of several models, measured in alternation in one run (METHODS 8)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError
from ffprune.evaluate.logits import last_logits

#: A model, or a function that loads one (called anew for each of its turns, and let go after it).
ModelSource = PreTrainedModel | Callable[[], PreTrainedModel]

_PROMPT_TOKENS = 8  # the context that decoding starts from
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Speed:
    """Speed of one model and its ratio to the first model (the dense one) of the same run.

    Attributes:
        prefill_tokens_per_s: median over rounds.
        decode_tokens_per_s: median over rounds.
        prefill_over_dense: median of ``prefill_ratios``; above 1 is faster than the first model.
        decode_over_dense: median of ``decode_ratios``.
        prefill_ratios: one ratio per round, both speeds taken in that round.
        decode_ratios: one ratio per round.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_over_dense: float
    decode_over_dense: float
    prefill_ratios: tuple[float, ...]
    decode_ratios: tuple[float, ...]


def measure(
    models: Mapping[str, ModelSource],
    prefill_tokens: int = 256,
    decode_tokens: int = 16,
    batch: int = 1,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Time models in turns, A B C A B C ..., so that a busy machine slows them all alike.

    Prefill is one forward pass over random tokens that fills a KV cache and gives the last position's
    logits. Decode is greedy, one token at a time with the KV cache, after a prompt of 8 tokens. Every model
    warms up first; one given as a function is loaded and warmed up before each of its turns, which costs
    time but holds a single model in memory.

    Args:
        models: name -> model or function returning one; the first is what ratios refer to.
        prefill_tokens: tokens per sequence in a prefill.
        decode_tokens: tokens generated per sequence.
        batch: sequences at a time; tokens per second count all of them.
        repeats: timed rounds.
        seed: of the random tokens; every model and round gets the same.
        progress: called after each turn with turns done and turns in total.

    Returns:
        Name -> speed, in the order given.

    Raises:
        ParameterError: no model, or a number below 1.
    """
    if not models or min(prefill_tokens, decode_tokens, batch, repeats) < 1:
        raise ParameterError(
            f"Asked to time {len(models)} models on {prefill_tokens} prefill and {decode_tokens} decode "
            f"tokens, {batch} sequences at a time, {repeats} times",
            "There must be at least one of each",
            "Raise the number that is below 1",
        )
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for source in models.values():
        if isinstance(source, PreTrainedModel):
            with ready(source) as model:
                _warm_up(model, prefill_tokens, batch, seed)
    for turn in range(repeats):
        for place, (name, source) in enumerate(models.items()):
            with ready(source) as model:
                if not isinstance(source, PreTrainedModel):
                    _warm_up(model, prefill_tokens, batch, seed)
                prefill[name].append(batch * prefill_tokens / _time_prefill(model, prefill_tokens, batch, seed))
                decode[name].append(batch * decode_tokens / _time_decode(model, decode_tokens, batch, seed))
            if progress is not None:
                progress(turn * len(models) + place + 1, repeats * len(models))
    first = next(iter(models))
    return {name: _speed(prefill[name], decode[name], prefill[first], decode[first]) for name in models}


def _speed(prefill: list[float], decode: list[float], dense_p: list[float], dense_d: list[float]) -> Speed:
    prefill_ratios = tuple(own / dense for own, dense in zip(prefill, dense_p, strict=True))
    decode_ratios = tuple(own / dense for own, dense in zip(decode, dense_d, strict=True))
    return Speed(
        statistics.median(prefill),
        statistics.median(decode),
        statistics.median(prefill_ratios),
        statistics.median(decode_ratios),
        prefill_ratios,
        decode_ratios,
    )


@contextmanager
def ready(source: ModelSource) -> Iterator[PreTrainedModel]:
    """The model in eval and inference mode; as it was afterwards."""
    model = source if isinstance(source, PreTrainedModel) else source()
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.train(training)


def random_tokens(model: PreTrainedModel, length: int, batch: int, seed: int) -> Tensor:
    """Tokens to time a model on, int64 ``[batch, length]``, on its device.

    Raises:
        ParameterError: they are more than the model's context, behind which learnt positions end.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ParameterError(
            f"The speed of sequences of {length} tokens was asked for",
            f"The model's context is {context} tokens (max_position_embeddings in config.json)",
            "Lower speed.prefill_tokens or latency.tokens",
        )
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _warm_up(model: PreTrainedModel, prefill_tokens: int, batch: int, seed: int) -> None:
    _time_prefill(model, prefill_tokens, batch, seed)
    _time_decode(model, _WARM_UP_STEPS, batch, seed)


def _time_prefill(model: PreTrainedModel, length: int, batch: int, seed: int) -> float:
    """Seconds for one forward pass over [batch, length] tokens."""
    tokens = random_tokens(model, length, batch, seed)
    start = now(model)
    last_logits(model, tokens)
    return now(model) - start


def _time_decode(model: PreTrainedModel, steps: int, batch: int, seed: int) -> float:
    """Seconds for ``steps`` greedy tokens after a prompt whose own forward pass is not counted."""
    output = model(input_ids=random_tokens(model, _PROMPT_TOKENS, batch, seed), use_cache=True, logits_to_keep=1)
    start = now(model)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return now(model) - start


def now(model: PreTrainedModel) -> float:
    """Seconds of a clock, once the model's device has done all it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
