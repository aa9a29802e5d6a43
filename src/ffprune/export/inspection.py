"""What a model folder holds: every layer's widths beside the dense ones, zeros, bytes, and how it loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffprune.models.checkpoint import load_model, stored_dtype
from ffprune.models.pretrained import needs_code
from ffprune.models.surgery import param_count
from ffprune.models.view import Block, ModelView
from ffprune.models.weights import weight_files


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer.

    Attributes:
        layer: index.
        heads: query heads, and those of a layer as wide as the config's global values say.
        groups: key/value heads, and those of such a layer.
        channels: FFN channels, and those of such a layer.
        weights: weights of its linear projections.
        zeros: share of them that is exactly zero.
    """

    layer: int
    heads: tuple[int, int]
    groups: tuple[int, int]
    channels: tuple[int, int]
    weights: int
    zeros: float


@dataclass(frozen=True)
class Inspection:
    """A folder that loads.

    Attributes:
        architecture: the model's class.
        dtype: number format in the files.
        parameters: all of them; tied ones once.
        prunable: weights of the decoder layers' linear projections.
        removed: share of prunable weights that are gone, of a model as wide as the global values say.
        zeros: share of the prunable weights that is exactly zero.
        bytes: of the safetensors files.
        needs_code: whether transformers alone needs ``trust_remote_code=True``.
        layers: one row a layer.
    """

    architecture: str
    dtype: str
    parameters: int
    prunable: int
    removed: float
    zeros: float
    bytes: int
    needs_code: bool
    layers: list[LayerRow]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def inspect(folder: Path) -> Inspection:
    """Load a model folder, which checks every tensor, and count.

    Raises:
        FfpruneError: it does not load; see :func:`ffprune.models.checkpoint.load_model`.
    """
    dtype = stored_dtype(folder)
    model = load_model(folder, dtype)
    view = ModelView(model)
    layers = [_row(block, view) for block in view.blocks]
    weights = sum(row.weights for row in layers)
    whole = sum(_dense_weights(block, row) for block, row in zip(view.blocks, layers, strict=True))
    return Inspection(
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=param_count(model),
        prunable=weights,
        removed=1 - weights / whole,
        zeros=sum(row.zeros * row.weights for row in layers) / weights,
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
        needs_code=needs_code(model.config),
        layers=layers,
    )


def _row(block: Block, view: ModelView) -> LayerRow:
    family, config = view.family, view.model.config
    weights = sum(linear.weight.numel() for linear in block.linears.values())
    zeros = sum(int(torch.count_nonzero(linear.weight == 0)) for linear in block.linears.values())
    return LayerRow(
        layer=block.index,
        heads=(block.groups * block.heads_per_group, getattr(config, family.heads)),
        groups=(block.groups, getattr(config, family.kv_heads)),
        channels=(block.channels, getattr(config, family.ffn_width)),
        weights=weights,
        zeros=zeros / weights,
    )


def _dense_weights(block: Block, row: LayerRow) -> int:
    """Weights of the layer, were it as wide as the config's global values say."""
    total = 0
    for role, linear in block.linears.items():
        now, whole = row.heads if role in "qo" else row.groups if role in "kv" else row.channels
        total += linear.weight.numel() // now * whole
    return total
