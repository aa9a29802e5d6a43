"""What every stage will need on a model of known shape: memory, disk, multiply-adds.

Memory is what a stage holds at its worst moment: weights in the number formats that it uses, Grams, factors,
activations of a batch. Mapped files count, for their pages do when they are read; the system takes these back where
memory is short, so that they are also told by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ffprune.compress.levels import FACTOR_BYTES, bank_bytes, levels_within
from ffprune.evaluate.reward import DENSE_BYTES
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView
from ffprune.stages.inputs import DTYPES
from ffprune.stages.sections import Params

LIBRARIES = 0.55e9
"""Bytes of Python with torch, transformers and MLflow, before a stage reads anything."""
LEARNING = 0.2e9
"""Bytes of stable-baselines3, which the search adds."""
SHARD = 5e9
"""Bytes of a file of weights, at most (:func:`ffprune.models.checkpoint.save_model`)."""
ASKING = 0.3e9
"""Bytes of lm-eval and its data sets, which evaluate adds."""
_HEAD_ROWS = 512
"""Rows of logits at a time (:func:`ffprune.evaluate.logits.reduce_logits`)."""
_LIKELY = 1024
"""Words of a dense distribution that are kept (:class:`ffprune.evaluate.divergence.Teacher`)."""


@dataclass(frozen=True)
class Cost:
    """What one stage needs.

    Attributes:
        stage: its name.
        memory: bytes held at once, at most, wherever they are.
        disk: bytes of its outputs.
        mapped: bytes of ``memory`` that are pages of files.
        device: bytes of ``memory`` that are on ``compute.device``.
        products: multiply-adds in the number format of ``compute.dtype``.
        single: multiply-adds in float32.
        double: multiply-adds in float64.
    """

    stage: str
    memory: float
    disk: float
    mapped: float = 0.0
    device: float = 0.0
    products: float = 0.0
    single: float = 0.0
    double: float = 0.0


def costs(view: ModelView, params: Params) -> list[Cost]:
    """Estimate every stage that works on a model.

    Args:
        view: the dense model, on the meta device or a real one.
        params: of the pipeline.
    """
    shape = _Shape(view, params)
    return [
        Cost("download", LIBRARIES + (4 + shape.stored) * shape.whole, shape.file, shape.file),
        _calibrate(shape, params),
        _sensitivity(shape, params),
        _levels(shape, params),
        _latency(shape, params),
        _search(shape, params, "search", params.search.episodes),
        _search(shape, params, "transfer", params.transfer.episodes),
        _prune(shape, params),
        _ridge(shape, params),
        _evaluate(shape, params),
    ]


class _Shape:
    """The numbers of a model that costs are made of.

    Args:
        view: the dense model.
        params: for number formats, sparsities and the bank.
    """

    def __init__(self, view: ModelView, params: Params) -> None:
        self.view = view
        self.size = DTYPES[params.compute.dtype].itemsize
        self.stored = DTYPES[params.model.storage_dtype].itemsize
        self.whole, self.prunable = param_count(view.model), view.prunable_params
        self.file = float(self.stored * self.whole)
        self.block = max(param_count(block.layer) for block in view.blocks)
        self.in_turn = params.compute.onload == "block"
        self.lasts = view.last_maps
        parts = [view.unit_linears(index) for index in range(len(view.units))]
        # Of a mixture's channels, a Gram relates those of an expert, and a token goes through those of a few experts.
        self.blocks = [part.blocks for part in parts]
        sides = [part.last.in_features // part.blocks for part in parts]
        visited = [part.per_token / part.blocks for part in parts]
        self.widest = max(sides)
        self.channels = max(last.in_features * share for last, share in zip(self.lasts, visited, strict=True))
        self.active = sum(unit.params * share for unit, share in zip(view.units, visited, strict=True))
        self.hidden = max(last.out_features for last in self.lasts)
        self.vocabulary = int(view.model.config.get_text_config().vocab_size)
        squares = [part.gram_size for part in parts]
        self.squares = sum(square * share for square, share in zip(squares, visited, strict=True))
        self.cubes = sum(square * side for square, side in zip(squares, sides, strict=True))
        self.grams = 4 * sum(squares)
        # One layer's: the inputs of its two last maps.
        self.layer_grams = 4 * max(map(sum, pairwise(squares)))
        self.maps = sum(4 * last.weight.numel() for last in self.lasts)
        self.logits = _HEAD_ROWS * self.vocabulary
        # A factorisation and a solution of every unit's repair.
        self.solving = self.cubes / 3 + sum(p.last.out_features * p.gram_size for p in parts)
        bank = params.levels
        self.levels, _ = levels_within(view, bank.min_keep, bank.step, self.size, bank.gigabytes * 1e9)
        self.bank = bank_bytes(view, self.levels, self.size)
        # Of a pruned model, both sparsities on average.
        self.left = self.whole - self.prunable * (params.search.sparsity + params.transfer.sparsity) / 2

    def held(self, size: float) -> float:
        """Bytes of the model on the device in numbers of this size: all of it, or a block and what is in no block."""
        return size * (self.whole - self.prunable + self.block if self.in_turn else self.whole)

    def loaded(self, size: float) -> float:
        """Bytes of the libraries, the model's file and the model on the device in numbers of this size."""
        return LIBRARIES + self.file + self.held(size)

    def forward(self, tokens: float, with_head: bool = True) -> float:
        """Multiply-adds of a forward pass."""
        return tokens * (self.active + (self.hidden * self.vocabulary if with_head else 0))

    def activations(self, tokens: int, layers: int = 1) -> float:
        """Hidden states, projections and FFN channels of a batch, in numbers."""
        return float(tokens) * layers * (8 * self.hidden + 3 * self.channels)


def _calibrate(shape: _Shape, params: Params) -> Cost:
    given = params.calibrate
    tokens, batch = given.windows * given.seqlen, min(given.batch_size, given.windows) * given.seqlen
    # Hidden states of all windows, at both ends of a layer, and once more while they are joined.
    streams = 3 * shape.size * tokens * shape.hidden
    # A Gram is checked for what is not finite by way of a copy and a half.
    working = (
        shape.layer_grams + 6 * shape.widest**2 + shape.size * shape.activations(batch) + 4 * batch * shape.channels
    )
    return Cost(
        "calibrate",
        shape.loaded(shape.size) + streams + working,
        shape.grams,
        shape.file,
        shape.held(shape.size) + working,
        products=shape.forward(tokens, with_head=False),
        single=tokens * shape.squares,
    )


def _sensitivity(shape: _Shape, params: Params) -> Cost:
    fisher, traces = params.sensitivity.fisher, params.sensitivity.hutchinson
    eliminating = torch.get_num_threads() * 5 * 8 * shape.widest**2
    batch = traces.batch_size * traces.seqlen
    # Gradient, probe, product and one more of each weight; the graph of a gradient, with the logits of a batch.
    graph = 4 * shape.activations(batch, len(shape.view.blocks)) + 8 * batch * shape.vocabulary
    differentiating = 4 * (4 * shape.prunable + graph)
    # Gradients need all weights at once: on the device, or on the CPU where blocks take turns.
    return Cost(
        "sensitivity",
        LIBRARIES + shape.file + 4 * shape.whole + max(shape.grams + eliminating, differentiating),
        0,
        shape.file + shape.grams,
        0 if shape.in_turn else 4 * shape.whole + differentiating,
        products=3 * shape.forward(fisher.windows * fisher.seqlen),
        single=6 * shape.forward(traces.probes * traces.windows * traces.seqlen),
        double=4 * shape.cubes,
    )


def _levels(shape: _Shape, params: Params) -> Cost:
    del params
    widths = [last.in_features // unit.granules for last, unit in zip(shape.lasts, shape.view.units, strict=True)]
    return Cost(
        "levels",
        shape.loaded(4)
        + shape.maps
        + shape.grams
        + 3 * 8 * shape.widest**2
        + 2 * shape.bank / max(len(shape.levels), 1),
        shape.bank,
        shape.file + shape.grams,
        shape.held(4),
        single=sum(
            last.out_features * sum((width * k) ** 2 for k in kept) / (2 * blocks)
            for last, width, blocks, kept in zip(shape.lasts, widths, shape.blocks, shape.levels, strict=True)
        ),
        double=shape.solving,
    )


def _latency(shape: _Shape, params: Params) -> Cost:
    given = params.latency
    if params.search.budget != "latency":
        return Cost("latency", LIBRARIES, 0)
    # A pass for every width, over units of half their width on the whole.
    tokens = given.batch * given.tokens
    passes = given.repeats * given.widths
    return Cost(
        "latency",
        shape.loaded(2 * shape.size) + shape.size * shape.activations(tokens),
        0,
        products=passes * shape.forward(tokens, with_head=False) / 2,
    )


def _search(shape: _Shape, params: Params, stage: str, episodes: int) -> Cost:
    given = params.search
    batch = min(given.batch_size, max(given.samples, given.final_samples)) * given.seqlen
    numbers = shape.whole + shape.prunable + shape.activations(batch) + shape.logits
    # Of the fixed windows and those of one draw; of earlier draws too, up to a limit.
    window = 8 * _LIKELY * given.seqlen
    drawn = given.samples * max(1, math.ceil(episodes / given.guide.batch))
    teacher = window * (given.final_samples + given.samples)
    teacher = max(teacher, min(DENSE_BYTES, window * (given.final_samples + drawn)))
    # The starts, the model's, the agent's and the best trials' policies, at most; those that fall behind read less.
    candidates = 3 + 2 + (given.finalists if episodes else 0)
    tried = episodes + candidates
    bank = min(shape.bank, tried * shape.size * shape.maps / 4)
    # Levels that the bank lacks, one a policy: Grams read, and factors kept.
    share = min(1.0, tried / len(shape.lasts))
    factors = share * (shape.grams + 2 * shape.maps)
    if shape.bank:
        factors = min(factors, FACTOR_BYTES)
    grams = share * shape.grams
    trying = LIBRARIES + shape.size * numbers + bank + teacher + factors + grams
    working = shape.size * (shape.activations(batch) + shape.logits)
    ordered = 0 if shape.in_turn else shape.size * shape.prunable
    compared = (1 + candidates) * given.final_samples
    return Cost(
        stage,
        LEARNING + shape.maps * min(4, shape.stored) / 4 + max(shape.loaded(4), trying),
        0,
        bank + grams,
        max(shape.held(4), shape.held(shape.size) + ordered + working),
        products=shape.forward((episodes * given.samples + compared) * given.seqlen),
    )


def _prune(shape: _Shape, params: Params) -> Cost:
    cut = shape.stored * shape.left
    return Cost("prune", LIBRARIES + shape.file + cut, 2 * len(params.prune.policies) * cut, shape.file)


def _ridge(shape: _Shape, params: Params) -> Cost:
    given, stream = params.ridge, params.ridge.stream
    plain, followed = len(given.repairs.get("ridge", ())), len(given.repairs.get("stream", ()))
    tokens = stream.windows * stream.seqlen
    batch = min(stream.batch_size, stream.windows) * stream.seqlen
    # The dense model's walk beside the pruned one's: streams and targets, a unit's inputs; its normal equations.
    streams = 4.0 * tokens * (6 * shape.hidden + shape.widest) if followed else 0.0
    working = 4 * (8 * shape.widest**2 + shape.activations(batch)) if followed else 0.0
    # A file of weights is converted as it is written.
    pruned = (shape.stored if shape.in_turn else 4) * shape.left + min(shape.stored * shape.left, SHARD)
    grams = shape.grams if plain else 0
    return Cost(
        "ridge",
        shape.loaded(4) + pruned + grams + streams + working,
        2 * (plain + followed) * shape.stored * shape.left,
        shape.file + grams,
        shape.held(4) + working + (0 if shape.in_turn else 4 * shape.left),
        products=2 * followed * 3 * shape.forward(tokens, with_head=False),
        single=2 * followed * tokens * shape.squares,
        double=2 * (plain + 3 * followed) * shape.solving,
    )


def _evaluate(shape: _Shape, params: Params) -> Cost:
    given = params.evaluate
    # Speeds are measured in turns, with a model of every shape at hand; repairs do not change shapes.
    shapes = 2 * len({method.partition("+")[0] for method in given.methods})
    working = shape.size * (shape.activations(given.batch_size * given.seqlen) + shape.logits)
    # Where blocks take turns, each of these models has one on the device.
    device = shape.held(shape.size) + shapes * (shape.held(shape.size) if shape.in_turn else shape.size * shape.left)
    mapped = shape.file + (shapes * shape.stored * shape.left if shape.in_turn else 0)
    return Cost(
        "evaluate",
        ASKING + LIBRARIES + mapped + device + working,
        0,
        mapped,
        device + working,
        products=(1 + 2 * len(given.methods)) * shape.forward(given.windows * given.seqlen),
    )
