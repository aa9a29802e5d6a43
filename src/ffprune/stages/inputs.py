"""What several stages read alike: models by the compute section, windows of text, Grams and orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError, TooLittleText
from ffprune.core.gram import Gram
from ffprune.core.units import Allocation
from ffprune.models.calibration import Calibration
from ffprune.models.checkpoint import load_model, load_tokenizer
from ffprune.models.config_file import read_config
from ffprune.models.view import ModelView
from ffprune.models.windows import token_windows
from ffprune.stages.artifacts import read_metadata, read_tensors, require, write_tensors
from ffprune.stages.context import StageContext
from ffprune.stages.record import CALIBRATION, DENSE, VALIDATION, dense_model
from ffprune.stages.sections import Compute, Recipe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    folder: Path, compute: Compute, dtype: torch.dtype | None = None, differentiated: bool = False
) -> PreTrainedModel:
    """A model on the configured device, in ``compute.dtype`` unless another is named.

    Args:
        folder: of the model.
        compute: where and how precisely.
        dtype: of its forward passes.
        differentiated: for gradients, which need all weights at once: blocks cannot take turns on the device then, and
            the whole model is loaded to the CPU instead.
    """
    dtype = dtype or DTYPES[compute.dtype]
    if differentiated and compute.onload == "block":
        return load_model(folder, dtype, finite=False)
    return load_model(folder, dtype, compute.device, compute.device_map, onload=compute.onload, finite=False)


def sample_windows(folder: Path, text: Path, seqlen: int, count: int, seed: int, key: str) -> Tensor:
    """``count`` windows of a text, drawn from all of it, so that no single article fills the sample.

    Args:
        folder: the dense model, for its tokenizer.
        text: the text file.
        seqlen: tokens in a window.
        count: windows to draw; 0 takes every window, in the order of the draw.
        seed: of the draw.
        key: the parameter that sets ``count``, for the message.

    Returns:
        int64 ``[count, seqlen]``.

    Raises:
        ParameterError: a window is longer than the model's context.
        TooLittleText: the text has fewer windows.
    """
    _check_context(folder, seqlen, key)
    windows = token_windows(load_tokenizer(folder), text.read_text(encoding="utf-8"), seqlen)
    if count > len(windows):
        raise TooLittleText(
            f"{key} asks for {count} windows of {seqlen} tokens",
            f"{text} has {len(windows)} of them",
            f"Lower {key}, shorten the windows, or give more text",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: count or len(windows)]]


def _check_context(folder: Path, seqlen: int, key: str) -> None:
    """Learnt positions end with the context, and what a model says behind it is worth nothing."""
    context = getattr(read_config(folder, trust_remote_code=False), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise ParameterError(
            f"{key} asks for windows of {seqlen} tokens",
            f"The model in {folder} has a context of {context} tokens (max_position_embeddings in config.json)",
            "Lower the seqlen of that section (for methods, the one in the section study)",
        )


def calibration_windows(
    ctx: StageContext, seqlen: int, count: int, key: str, salt: int = 0, model: str = DENSE
) -> Tensor:
    """:func:`sample_windows` of the calibration text, by the run's seed; another ``salt`` is another draw."""
    return sample_windows(ctx.path(model), ctx.path(CALIBRATION), seqlen, count, ctx.params.seed + salt, key)


def dense_view(ctx: StageContext, dtype: torch.dtype | None = None, differentiated: bool = False) -> ModelView:
    """The dense model with the units that the parameters name; arguments as :func:`load`."""
    model = load(ctx.path(DENSE), ctx.params.compute, dtype, differentiated)
    return ModelView(model, ctx.params.units.heads)


def recipe_calibration(
    ctx: StageContext, name: str, recipe: Recipe, progress: Callable[[int, int], None]
) -> Calibration:
    """What an entry of ``methods`` calibrates its model on: as many windows as it asks for, else the study's.

    Args:
        ctx: of a stage that may read ``study.calibration`` and ``compute``.
        name: of the entry.
        recipe: the entry.
        progress: told of layers done and in all.
    """
    study = ctx.params.study
    count = recipe.calibration_windows or study.calibration.windows
    key = f"methods.{name}.calibration_windows" if recipe.calibration_windows else "study.calibration.windows"
    windows = calibration_windows(ctx, study.calibration.seqlen, count, key, model=dense_model(recipe.model))
    return Calibration(windows, study.calibration.batch_size, DTYPES[ctx.params.compute.dtype], progress)


def validation_windows(ctx: StageContext, seqlen: int, key: str, model: str = DENSE) -> Tensor:
    """All windows of the validation text, in the order of a draw by the run's seed (:func:`sample_windows`)."""
    return sample_windows(ctx.path(model), ctx.path(VALIDATION), seqlen, 0, ctx.params.seed, key)


def write_grams(folder: Path, layer: int, grams: Mapping[str, Gram]) -> None:
    """A layer's full Grams, by role, in a file of its own: no more than one layer's need be in memory."""
    full = {role: gram.xx for role, gram in grams.items() if gram.xx is not None}
    write_tensors(_grams_file(folder, layer), full, {"tokens": str(next(iter(grams.values())).count)})


def read_grams(view: ModelView, folder: Path) -> list[Tensor]:
    """Per unit, the Gram X^T X of its last map's input, float32 ``[n, n]``, mapped from its layer's file."""
    layers = [read_tensors(_grams_file(require(folder), block.index)) for block in view.blocks]
    return [layers[unit.layer][view.unit_linears(index).last_role] for index, unit in enumerate(view.units)]


def gram_tokens(folder: Path) -> int:
    """Tokens that the Grams were summed over."""
    return int(read_metadata(_grams_file(require(folder), 0))["tokens"])


def _grams_file(folder: Path, layer: int) -> Path:
    return folder / f"layers.{layer}.safetensors"


def read_orders(view: ModelView, path: Path, repaired: bool) -> list[Tensor]:
    """Per unit, its granules from the most to the least important, int64 ``[granules]`` (or ``[granules, runs]``).

    Args:
        view: the dense model.
        path: the file of orders.
        repaired: the order for cuts that are repaired afterwards, or the one for cuts left as they are.
    """
    tensors = read_tensors(path)
    return [tensors[f"{unit.name}.{'repaired' if repaired else 'plain'}"] for unit in view.units]


def kept_granules(orders: Sequence[Tensor], allocation: Allocation) -> list[Tensor]:
    """Per unit, the granules that stay, in their original order, int64 ``[kept]`` (or ``[kept, runs]``)."""
    return [torch.sort(order[:kept], dim=0).values for order, kept in zip(orders, allocation.kept, strict=True)]
