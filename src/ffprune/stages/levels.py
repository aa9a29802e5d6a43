"""levels: the bank of repaired last maps, so that a search trial copies and solves nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ffprune.compress.levels import Levels, coarsest, levels_within
from ffprune.core.units import Unit
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, dense_view, read_grams, read_orders
from ffprune.stages.record import GRAMS, LEVELS, ORDER


def run(ctx: StageContext) -> None:
    """One file a unit, of maps in the dtype of the search's forward passes."""
    params, dtype = ctx.params.levels, DTYPES[ctx.params.compute.dtype]
    view = dense_view(ctx, torch.float32)
    levels, step = levels_within(view, params.min_keep, params.step, dtype.itemsize, params.gigabytes * 1e9)
    if not step and params.gigabytes:
        least = coarsest(view, params.min_keep, params.step, dtype.itemsize) / 1e9
        print(
            f"warning: no bank has room in levels.gigabytes ({params.gigabytes:g}): the smallest takes {least:.2g}, on "
            "disk. Without one a search solves for the maps of every policy: slow, and much memory ('ffprune plan')",
            file=sys.stderr,
        )
    maker = Levels(view, read_orders(view, ctx.path(ORDER), True), read_grams(view, ctx.path(GRAMS)), params.damping)
    written = 0
    with artifacts.atomic_dir(ctx.path(LEVELS)) as folder, ctx.progress(len(view.units), "repaired maps") as bar:
        for unit, maps in zip(view.units, maker.fill(levels, dtype), strict=True):
            if maps:
                artifacts.write_tensors(_file(folder, unit), {str(kept): map for kept, map in maps.items()})
            written += sum(map.nbytes for map in maps.values())
            bar.update()
    ctx.log_metrics({"levels": sum(map(len, levels)), "step": step, "gigabytes": written / 1e9})


def read_levels(
    view: ModelView, orders: Sequence[Tensor], at: Callable[[str], Path], damping: float, step: int
) -> Levels:
    """The repaired last maps of every unit at any retention; those in the bank are mapped, not read.

    Args:
        view: the dense model, in full precision still.
        orders: per unit, that the bank was made with.
        at: where a file of the project is.
        damping: that the bank was made with.
        step: FFN channels that policies go by.
    """
    files = [_file(artifacts.require(at(LEVELS)), unit) for unit in view.units]
    bank = [artifacts.read_tensors(file) if file.exists() else {} for file in files]
    named = [{int(kept): map for kept, map in maps.items()} for maps in bank]
    return Levels(view, orders, read_grams(view, at(GRAMS)), damping, named, step)


def _file(folder: Path, unit: Unit) -> Path:
    """Where the bank keeps a unit's repaired maps."""
    return folder / f"{unit.name}.safetensors"
