"""``ffprune plan``: memory, disk and time of every stage, from a model's config alone.

The model is built on torch's meta device, which has shapes and no numbers. Memory is what a stage holds at its worst
moment: weights in the number formats that it uses, Grams, factors, activations of a batch. Mapped files count, for
their pages do when they are read. Time is multiply-adds over what this machine reaches in a matrix product, and so a
lower bound that real stages miss by what they do besides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ffprune.compress.levels import levels_within
from ffprune.core.errors import MissingInput
from ffprune.models.view import ModelView
from ffprune.stages.inputs import DTYPES
from ffprune.stages.record import DENSE
from ffprune.stages.sections import Params

SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes known by name (Touvron et al. 2023): what is asked most, answered without a network."""

LIBRARIES = 0.55e9
"""Bytes of Python with torch, transformers and MLflow, before a stage reads anything."""


LEARNING = 0.2e9
"""Bytes of stable-baselines3, which the search adds."""


ASKING = 0.3e9
"""Bytes of lm-eval and its data sets, which evaluate adds."""


@dataclass(frozen=True)
class Cost:
    """What one stage needs.

    Attributes:
        stage: its name.
        memory: bytes held at once, at most.
        disk: bytes of its outputs.
        products: multiply-adds in the number format of ``compute.dtype``.
        single: multiply-adds in float32.
        double: multiply-adds in float64.
    """

    stage: str
    memory: float
    disk: float
    products: float = 0.0
    single: float = 0.0
    double: float = 0.0


def costs(view: ModelView, params: Params) -> list[Cost]:
    """Estimate every stage that works on a model.

    Args:
        view: the dense model, on the meta device or a real one.
        params: of the pipeline.
    """
    size = DTYPES[params.compute.dtype].itemsize
    stored = DTYPES[params.model.storage_dtype].itemsize
    whole, prunable = sum(p.numel() for p in view.model.parameters()), view.prunable_params
    lasts = [view.unit_linears(i).last for i in range(len(view.units))]
    widest = max(last.in_features for last in lasts)
    hidden = max(last.out_features for last in lasts)
    head = hidden * int(view.model.config.get_text_config().vocab_size)
    grams = sum(4 * last.in_features**2 for last in lasts)
    cubes = sum(last.in_features**3 for last in lasts)
    maps = sum(4 * last.weight.numel() for last in lasts)
    solving = cubes / 3 + sum(last.out_features * last.in_features**2 for last in lasts)

    def forward(tokens: float, with_head: bool = True) -> float:
        return tokens * (prunable + (head if with_head else 0))

    def activations(tokens: int, layers: int = 1) -> float:
        """Hidden states, projections and FFN channels of a batch."""
        return float(tokens) * layers * (8 * hidden + 3 * widest)

    found = [Cost("download", LIBRARIES + (4 + stored) * whole, stored * whole)]

    calibrate = params.calibrate
    tokens = calibrate.windows * calibrate.seqlen
    batch = min(calibrate.batch_size, calibrate.windows) * calibrate.seqlen
    found.append(
        Cost(
            "calibrate",
            LIBRARIES
            + (stored + size) * whole
            + grams
            + 4 * widest**2
            + size * activations(batch)
            + 4 * batch * widest,
            grams,
            products=forward(tokens, with_head=False),
            single=tokens * sum(last.in_features**2 for last in lasts),
        )
    )

    sensitivity = params.sensitivity
    fisher, traces = sensitivity.fisher, sensitivity.hutchinson
    threads = torch.get_num_threads()
    eliminating = threads * 5 * 8 * widest**2
    layers = len(view.blocks)
    batch = traces.batch_size * traces.seqlen
    vocabulary = head / hidden
    # Gradient, probe, product and one more of each weight; the graph of a gradient, with the logits of a batch.
    differentiating = 4 * (4 * prunable + 4 * activations(batch, layers) + 8 * batch * vocabulary)
    found.append(
        Cost(
            "sensitivity",
            LIBRARIES + (stored + 4) * whole + max(grams + eliminating, differentiating),
            0,
            products=3 * forward(fisher.windows * fisher.seqlen),
            single=6 * forward(traces.probes * traces.windows * traces.seqlen),
            double=4 * cubes,
        )
    )

    levels = params.levels
    kept, _ = levels_within(view, levels.min_keep, levels.step, size, levels.gigabytes * 1e9)
    width = [last.in_features // unit.granules for last, unit in zip(lasts, view.units, strict=True)]
    bank = sum(size * last.out_features * w * sum(counts) for last, w, counts in zip(lasts, width, kept, strict=True))
    found.append(
        Cost(
            "levels",
            LIBRARIES + (stored + 4) * whole + maps + grams + 3 * 8 * widest**2 + 2 * bank / max(len(kept), 1),
            bank,
            single=sum(
                last.out_features * sum((w * k) ** 2 for k in counts) / 2
                for last, w, counts in zip(lasts, width, kept, strict=True)
            ),
            double=solving,
        )
    )

    search = params.search
    window = search.seqlen
    batch = min(search.batch_size, max(search.samples, search.final_samples)) * window
    logits = 512 * vocabulary
    loading = (stored + 4) * whole
    trying = size * (whole + prunable + activations(batch) + logits) + bank
    teacher = 8 * 1024 * window * (search.final_samples + search.samples)
    # Levels that the bank lacks: Grams read, and factors kept.
    factors = 2 * grams + 2 * maps
    searching = LIBRARIES + LEARNING + maps + max(loading, trying + teacher + factors)
    compared = (3 + 2 + search.finalists) * search.final_samples + search.final_samples
    for stage, episodes in (("search", search.episodes), ("transfer", params.transfer.episodes)):
        found.append(Cost(stage, searching, 0, products=forward((episodes * search.samples + compared) * window)))

    policies = len(params.prune.policies)
    left = whole - prunable * (search.sparsity + params.transfer.sparsity) / 2
    found.append(Cost("prune", LIBRARIES + 3 * stored * whole, 2 * policies * stored * left))

    ridge = params.ridge
    stream = ridge.stream
    plain, followed = len(ridge.repairs.get("ridge", ())), len(ridge.repairs.get("stream", ()))
    held = 4.0 * stream.windows * stream.seqlen
    # The dense model's walk beside the pruned one's: a copy of the model, streams and targets, a unit's inputs.
    following = 4 * whole + held * (6 * hidden + 2 * widest) + 4 * 8 * widest**2 if followed else 0.0
    found.append(
        Cost(
            "ridge",
            LIBRARIES + (stored + 8) * whole + (grams if plain else 0) + following,
            2 * (plain + followed) * stored * left,
            products=2 * followed * 3 * forward(stream.windows * stream.seqlen, with_head=False),
            single=2 * followed * stream.windows * stream.seqlen * sum(last.in_features**2 for last in lasts),
            double=2
            * (plain + 3 * followed)
            * (cubes / 3 + sum(last.out_features * last.in_features**2 for last in lasts)),
        )
    )

    evaluate = params.evaluate
    batch = evaluate.batch_size * evaluate.seqlen
    models = 1 + 2 * len(evaluate.methods)
    # Speeds are measured in turns, with a model of every shape at hand; repairs do not change shapes.
    shapes = 2 * len({method.partition("+")[0] for method in evaluate.methods})
    found.append(
        Cost(
            "evaluate",
            LIBRARIES + ASKING + (stored + size) * whole + size * (shapes * left + activations(batch) + logits),
            0,
            products=models * forward(evaluate.windows * evaluate.seqlen),
        )
    )
    return found


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config that has shapes and no numbers."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def config_of(name: str | None) -> tuple[str, PretrainedConfig]:
    """A config, by a name of :data:`SHAPES`, a folder or a hub identifier; None: the model of this project.

    Raises:
        MissingInput: there is no such config here, and none could be fetched.
    """
    if name in SHAPES:
        return str(name), AutoConfig.for_model("llama", tie_word_embeddings=False, **SHAPES[str(name)])
    place = name or DENSE
    try:
        return place, AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise MissingInput(
            f"The plan of {place} was asked for",
            "It is no folder with a config.json, and no such identifier could be fetched from the hub",
            f"Run 'ffprune download' first, name a folder or an identifier, or a known shape: {', '.join(SHAPES)}",
        ) from error


def rate(dtype: torch.dtype, device: str) -> float:
    """Multiply-adds a second that a square matrix product reaches here: the best of five."""
    size = 1024 if dtype == torch.float64 else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
    return size**3 / best


def print_plan(name: str | None, params: Params) -> None:
    """Print the estimates, and what they rest on."""
    from rich.console import Console
    from rich.table import Table

    place, config = config_of(name)
    view = ModelView(meta_model(config))
    compute = params.compute
    torch.set_float32_matmul_precision(compute.matmul_precision)
    rates = {dtype: rate(dtype, compute.device) for dtype in (DTYPES[compute.dtype], torch.float32, torch.float64)}
    table = Table(title=f"{place}: {sum(p.numel() for p in view.model.parameters()):,} parameters")
    for number, column in enumerate(("stage", "memory (GB)", "disk (GB)", "time at least")):
        table.add_column(column, justify="right" if number else "left")
    for cost in costs(view, params):
        amounts = zip((cost.products, cost.single, cost.double), rates.values(), strict=True)
        seconds = sum(amount / speed for amount, speed in amounts)
        table.add_row(cost.stage, f"{cost.memory / 1e9:,.1f}", f"{cost.disk / 1e9:,.1f}", _duration(seconds))
    Console(width=100).print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
