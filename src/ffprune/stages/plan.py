"""``ffprune plan``: memory, disk and time of every stage, from a model's config alone.

The model is built on torch's meta device, which has shapes and no numbers. Time is multiply-adds over what this machine
reaches in a matrix product, and so a lower bound that real stages miss by what they do besides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ffprune.core.errors import MissingInput
from ffprune.models.families import family_of
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView
from ffprune.stages.costs import Cost, costs
from ffprune.stages.inputs import DTYPES
from ffprune.stages.record import DENSE
from ffprune.stages.sections import Compute, Params

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


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config that has shapes and no numbers."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # of a library
    return model


def config_of(name: str | None) -> tuple[str, PretrainedConfig]:
    """A config, by a name of :data:`SHAPES`, a folder or a hub identifier; None: the model of this project.

    Raises:
        MissingInput: there is no such config here, and none could be fetched.
    """
    if name in SHAPES:
        return str(name), AutoConfig.for_model("llama", tie_word_embeddings=False, **SHAPES[str(name)])
    place = name or DENSE
    folder = Path(place).expanduser()
    try:
        # What looks like a path is not the hub's. The hub is asked once: AutoConfig would try six times, and say so.
        if not (name is None or place.startswith((".", "/", "~")) or folder.is_dir()):
            folder = Path(snapshot_download(place, allow_patterns=["config.json"]))
        return place, AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, HfHubHTTPError) as error:
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


def print_plan(name: str | None, params: Params, as_json: bool = False) -> None:
    """Print the estimates, and what they rest on."""
    from rich.console import Console
    from rich.table import Table

    place, config = config_of(name)
    family_of(config)  # refuses what could not even be built
    view = ModelView(meta_model(config))
    compute = params.compute
    rates = _rates(compute)
    stages = [(cost, None if rates is None else _seconds(cost, rates)) for cost in costs(view, params)]
    if as_json:
        about = {"model": place, "parameters": param_count(view.model), "device": compute.device}
        print(json.dumps({**about, "stages": [_told(*stage) for stage in stages]}, indent=2))
        return
    table = Table(title=f"{place}: {param_count(view.model):,} parameters")
    columns = ("stage", "memory (GB)", "mapped", "on the device", "disk (GB)", "time at least")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for cost, seconds in stages:
        sizes = (cost.memory, cost.mapped, cost.device, cost.disk)
        time_at_least = "?" if seconds is None else _duration(seconds)
        table.add_row(cost.stage, *(f"{size / 1e9:,.1f}" for size in sizes), time_at_least)
    console = Console(width=100)
    console.print(table)
    console.print(
        f"memory: at most, wherever it is. Of it, mapped: pages of files, which the system takes back where memory is "
        f"short; on the device: on {compute.device} (compute.onload: {compute.onload})."
    )
    if rates is None:
        console.print(f"time: not known, since torch cannot compute on {compute.device} here.")


def _rates(compute: Compute) -> list[float] | None:
    """Multiply-adds a second in ``compute.dtype``, float32 and float64; None where this machine has not the device.

    A plan is what is asked before there is a GPU.
    """
    torch.set_float32_matmul_precision(compute.matmul_precision)
    try:
        return [rate(dtype, compute.device) for dtype in (DTYPES[compute.dtype], torch.float32, torch.float64)]
    except (AssertionError, RuntimeError, TypeError):  # of a torch without this backend; of a backend without float64
        return None


def _seconds(cost: Cost, rates: Sequence[float]) -> float:
    """At least, with the multiply-adds a second of the three number formats."""
    amounts = (cost.products, cost.single, cost.double)
    return sum(amount / speed for amount, speed in zip(amounts, rates, strict=True))


def _told(cost: Cost, seconds: float | None) -> dict[str, object]:
    """A stage for scripts; sizes in bytes."""
    sizes = {"memory": cost.memory, "mapped": cost.mapped, "on_device": cost.device, "disk": cost.disk}
    return {"stage": cost.stage, **{f"{name}_bytes": round(size) for name, size in sizes.items()}, "seconds": seconds}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
