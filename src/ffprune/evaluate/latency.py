"""Block times of a model's units by the granules kept: what a budget of latency is counted in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffprune.core.latency import BlockTimes, measured_counts
from ffprune.core.tables import look_up
from ffprune.evaluate.speed import now, random_tokens, ready
from ffprune.models.surgery import read_unit, set_unit
from ffprune.models.view import ModelView

_DECODED = 8
"""Tokens that a timed decoding is long."""


@dataclass(frozen=True)
class Probe:
    """What is timed.

    Attributes:
        phase: row of :data:`PHASES`: ``prefill`` of ``tokens`` tokens, or ``decode``, a token that comes after as many.
        tokens: in a sequence.
        batch: sequences at a time.
        widths: numbers of granules measured per kind of unit, besides one.
        repeats: rounds; the least time counts.
    """

    phase: str
    tokens: int
    batch: int
    widths: int
    repeats: int


@dataclass(frozen=True)
class Latencies:
    """What was measured.

    Attributes:
        times: of the units of every shape.
        dense_milliseconds: of all decoder layers, dense, timed as one; the times of dense units add up to about this.
    """

    times: tuple[BlockTimes, ...]
    dense_milliseconds: float

    @property
    def sum_milliseconds(self) -> float:
        """Of all dense units, added up."""
        return sum(len(times.units) * times.milliseconds[-1] for times in self.times)


def block_latencies(view: ModelView, probe: Probe, progress: Callable[[int, int], None]) -> Latencies:
    """Time the decoder with its units at several widths, all in turns.

    One shape of unit is varied at a time, in all its layers, while every other unit keeps one granule: an attention's
    time at k groups is that of the layers beyond the layers with one granule everywhere, plus these (norms and
    residual sums, which nothing removes, are counted here, once a layer); an FFN's is the first part alone. What the
    decoder takes without its layers (embedding, final norm) is subtracted. Weights are contiguous, as a pruned model's.

    Args:
        view: the dense model; units are set while it is measured, and set back.
        probe: what is timed.
        progress: called after each turn with turns done and turns in total.

    Raises:
        ParameterError: unknown phase.
    """
    time = look_up(PHASES, probe.phase, "latency.phase")
    shapes = _shapes(view)
    counts = [measured_counts(view.units[members[0]].granules, probe.widths) for members in shapes]
    ones, dense = [1] * len(view.units), [unit.granules for unit in view.units]
    # None: no layer at all. A shape at one granule is `ones`.
    states: list[list[int] | None] = [None, ones, dense]
    for members, kept in zip(shapes, counts, strict=True):
        states += [[k if i in members else 1 for i in range(len(ones))] for k in kept[1:]]
    with ready(view.model):
        tokens = random_tokens(view.model, probe.tokens + _DECODED, probe.batch, seed=0)
        best = [float("inf")] * len(states)
        for turn in range(probe.repeats):
            for place, state in enumerate(states):
                with _set(view, state):
                    time(view, tokens)  # warms up
                    best[place] = min(best[place], 1000 * time(view, tokens))
                progress(turn * len(states) + place + 1, probe.repeats * len(states))
    nothing, least, whole, *rest = best
    floor = (least - nothing) / len(view.blocks)
    times = []
    for members, kept in zip(shapes, counts, strict=True):
        own, rest = rest[: len(kept) - 1], rest[len(kept) - 1 :]
        base = floor if view.units[members[0]].kind == "attention" else 0.0
        taken = (base, *(base + (value - least) / len(members) for value in own))
        names = tuple(view.units[i].name for i in members)
        times.append(BlockTimes(names, view.units[members[0]].granules, kept, taken))
    return Latencies(tuple(times), whole - nothing)


def _shapes(view: ModelView) -> list[list[int]]:
    """Indices of units that are alike in kind, granules and the shapes of all their linears."""
    found: dict[Any, list[int]] = {}
    for index, unit in enumerate(view.units):
        parts = view.unit_linears(index)
        inputs = tuple((role, tuple(linear.weight.shape)) for role, linear in parts.inputs.items())
        found.setdefault((unit.kind, unit.granules, inputs, tuple(parts.last.weight.shape)), []).append(index)
    return list(found.values())


@contextmanager
def _set(view: ModelView, kept: Sequence[int] | None) -> Iterator[None]:
    """The model with the first so many granules of every unit, or without its layers."""
    if kept is None:
        with _without_layers([block.layer for block in view.blocks]):
            yield
        return
    dense = [read_unit(view, index) for index in range(len(view.units))]
    try:
        for index, count in enumerate(kept):
            set_unit(view, index, dense[index].select(torch.arange(count)))
        yield
    finally:
        for index, weights in enumerate(dense):
            set_unit(view, index, weights)


@contextmanager
def _without_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.forward = lambda hidden, **_: hidden
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _prefill(view: ModelView, tokens: Tensor) -> float:
    """Seconds of one pass over all but the last tokens, which fills a KV cache; the LM head is left out."""
    decoder: Any = view.model.get_decoder()  # type: ignore[no-untyped-call]  # of a library
    started = now(view.model)
    decoder(input_ids=tokens[:, :-_DECODED], use_cache=True)
    return now(view.model) - started


def _decode(view: ModelView, tokens: Tensor) -> float:
    """Seconds of one token with a KV cache, the mean over the last tokens."""
    decoder: Any = view.model.get_decoder()  # type: ignore[no-untyped-call]  # of a library
    cache = decoder(input_ids=tokens[:, :-_DECODED], use_cache=True).past_key_values
    started = now(view.model)
    for token in torch.split(tokens[:, -_DECODED:], 1, dim=1):
        cache = decoder(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return (now(view.model) - started) / _DECODED


PHASES: dict[str, Callable[[ModelView, Tensor], float]] = {"prefill": _prefill, "decode": _decode}
