"""Block times of a model's units by the granules kept: what a budget of latency is counted in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        repeats: rounds.
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
        dense_milliseconds: of all dense decoder layers; the times of dense units add up to about this.
    """

    times: tuple[BlockTimes, ...]
    dense_milliseconds: float

    @property
    def sum_milliseconds(self) -> float:
        """Of all dense units, added up."""
        return sum(len(times.units) * times.milliseconds[-1] for times in self.times)


def block_latencies(view: ModelView, probe: Probe, progress: Callable[[int, int], None]) -> Latencies:
    """Time every decoder layer with its units at several widths, all in turns.

    One kind of unit is varied at a time, while every other unit keeps one granule: an attention's time at k groups is
    that of its layer then (norms and residual sums, which nothing removes, are counted here, once a layer); an FFN's is
    what its layer takes beyond the one with one granule of each. Layers are timed one by one in a pass of the whole
    decoder, so that weights are not in the cache, and layers of one shape are samples of one time: the least of all
    layers and rounds is what is left when other load, which only adds, takes a break. Weights are contiguous, as a
    pruned model's.

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
    # The first of a shape's counts is `ones`.
    states = [ones, dense]
    for members, kept in zip(shapes, counts, strict=True):
        states += [[k if i in members else 1 for i in range(len(ones))] for k in kept[1:]]
    best = np.full((len(states), len(view.blocks)), np.inf)
    with ready(view.model):
        tokens = random_tokens(view.model, probe.tokens + _DECODED, probe.batch, seed=0)
        for turn in range(probe.repeats):
            for place, state in enumerate(states):
                with _set(view, state):
                    best[place] = np.minimum(best[place], 1000 * np.array(time(view, tokens)))
                progress(turn * len(states) + place + 1, probe.repeats * len(states))
    least, whole, *rest = best
    times = []
    for members, kept in zip(shapes, counts, strict=True):
        layers = [view.units[i].layer for i in members]
        own, rest = rest[: len(kept) - 1], rest[len(kept) - 1 :]
        first = float(least[layers].min())
        taken = [first, *(float(row[layers].min()) for row in own)]
        base = 0.0 if view.units[members[0]].kind == "attention" else first
        names = tuple(view.units[i].name for i in members)
        times.append(BlockTimes(names, view.units[members[0]].granules, kept, tuple(value - base for value in taken)))
    alike: dict[tuple[int, ...], list[int]] = {}
    for block in view.blocks:
        mine = (n for n, members in enumerate(shapes) for i in members if view.units[i].layer == block.index)
        alike.setdefault(tuple(mine), []).append(block.index)
    return Latencies(tuple(times), sum(len(layers) * float(whole[layers].min()) for layers in alike.values()))


def _shapes(view: ModelView) -> list[list[int]]:
    """Indices of units that are alike in kind, granules and the shapes of all their linears."""
    found: dict[Any, list[int]] = {}
    for index, unit in enumerate(view.units):
        parts = view.unit_linears(index)
        inputs = tuple((role, tuple(linear.weight.shape)) for role, linear in parts.inputs.items())
        found.setdefault((unit.kind, unit.granules, inputs, tuple(parts.last.weight.shape)), []).append(index)
    return list(found.values())


@contextmanager
def _set(view: ModelView, kept: Sequence[int]) -> Iterator[None]:
    """The model with the first so many granules of every unit; as it was afterwards."""
    dense = [read_unit(view, index) for index in range(len(view.units))]
    try:
        for index, count in enumerate(kept):
            set_unit(view, index, dense[index].select(torch.arange(count)))
        yield
    finally:
        for index, weights in enumerate(dense):
            set_unit(view, index, weights)


@contextmanager
def _clocked(view: ModelView) -> Iterator[list[float]]:
    """Gives the least seconds that each layer takes, float ``[layers]``, of the passes made meanwhile."""
    least, started = [float("inf")] * len(view.blocks), [0.0]

    def begin(*_: Any) -> None:
        started[0] = now(view.model)

    def end(index: int, *_: Any) -> None:
        least[index] = min(least[index], now(view.model) - started[0])

    hooks = [block.layer.register_forward_pre_hook(begin) for block in view.blocks]
    hooks += [block.layer.register_forward_hook(partial(end, block.index)) for block in view.blocks]
    try:
        yield least
    finally:
        for hook in hooks:
            hook.remove()


def _prefill(view: ModelView, tokens: Tensor) -> list[float]:
    """Seconds of every layer in a pass over all but the last tokens, which fills a KV cache."""
    decoder: Any = view.model.get_decoder()  # type: ignore[no-untyped-call]  # of a library
    with _clocked(view) as least:
        decoder(input_ids=tokens[:, :-_DECODED], use_cache=True)
    return least


def _decode(view: ModelView, tokens: Tensor) -> list[float]:
    """Seconds of every layer for one token with a KV cache, the least of the last tokens."""
    decoder: Any = view.model.get_decoder()  # type: ignore[no-untyped-call]  # of a library
    cache = decoder(input_ids=tokens[:, :-_DECODED], use_cache=True).past_key_values
    with _clocked(view) as least:
        for token in torch.split(tokens[:, -_DECODED:], 1, dim=1):
            cache = decoder(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return least


PHASES: dict[str, Callable[[ModelView, Tensor], list[float]]] = {"prefill": _prefill, "decode": _decode}
