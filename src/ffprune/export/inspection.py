"""What a model folder holds: every layer's widths beside the dense ones, zeros, bytes, and how it loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ffprune.core.units import Allocation
from ffprune.models.checkpoint import load_model, stored_dtype
from ffprune.models.pretrained import needs_code
from ffprune.models.surgery import param_count
from ffprune.models.view import Block, ModelView
from ffprune.models.weights import weight_bytes


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
    return inspect_model(ModelView(load_model(folder, stored_dtype(folder))), folder)


def inspect_model(view: ModelView, folder: Path) -> Inspection:
    """:func:`inspect` for a folder that has been loaded, in the number format of its files."""
    layers = [_row(block, view) for block in view.blocks]
    weights = sum(row.weights for row in layers)
    return Inspection(
        architecture=type(view.model).__name__,
        dtype=str(view.model.dtype).removeprefix("torch."),
        parameters=param_count(view.model),
        prunable=weights,
        removed=cut(view).sparsity,
        zeros=sum(row.zeros * row.weights for row in layers) / weights,
        bytes=weight_bytes(folder),
        needs_code=needs_code(view.model.config),
        layers=layers,
    )


def cut(view: ModelView) -> Allocation:
    """What is left of every unit of a model as wide as the config's global values say."""
    config, family = view.model.config, view.family
    whole = {"attention": getattr(config, family.kv_heads), "ffn": getattr(config, family.ffn_width)}
    units = tuple(replace(unit, granules=whole[unit.kind]) for unit in view.units)
    return Allocation(units, tuple(unit.granules for unit in view.units))


def masked(view: ModelView) -> Allocation:
    """How many weights of every prunable matrix are not zero."""
    return Allocation(
        view.weight_units, tuple(int(torch.count_nonzero(linear.weight)) for linear in view.prunable.values())
    )


def _row(block: Block, view: ModelView) -> LayerRow:
    family, config = view.family, view.model.config
    weights = sum(linear.weight.numel() for linear in block.linears.values())
    zeros = sum(int(torch.count_nonzero(linear.weight == 0)) for linear in block.linears.values())
    return LayerRow(
        layer=block.index,
        heads=(block.heads, getattr(config, family.heads)),
        groups=(block.groups, getattr(config, family.kv_heads)),
        channels=(block.channels, getattr(config, family.ffn_width)),
        weights=weights,
        zeros=zeros / weights,
    )
