"""What a model folder holds: every layer's widths beside the dense ones, zeros, bytes, and how it loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffprune.core.units import Allocation, Unit
from ffprune.models.checkpoint import load_model, stored_dtype
from ffprune.models.layer_config import LayerShape, dense_shape_told, read_dense_shape
from ffprune.models.pretrained import needs_code
from ffprune.models.surgery import param_count
from ffprune.models.view import Block, ModelView
from ffprune.models.weights import weight_bytes


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer.

    Attributes:
        layer: index.
        heads: query heads, and those of a layer of the dense model.
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
        removed: share of the dense model's prunable weights that are gone.
        dense_told: whether config.json tells the dense model's widths; else they are its global values, as of a model
            that nothing was cut from, or that was cut before they were told.
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
    dense_told: bool
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
    dense = read_dense_shape(view.model.config, view.family)
    layers = [_row(block, dense) for block in view.blocks]
    weights = sum(row.weights for row in layers)
    return Inspection(
        architecture=type(view.model).__name__,
        dtype=str(view.model.dtype).removeprefix("torch."),
        parameters=param_count(view.model),
        prunable=weights,
        removed=1 - weights / sum(_dense_weights(block, dense) for block in view.blocks),
        dense_told=dense_shape_told(view.model.config) is not None,
        zeros=sum(row.zeros * row.weights for row in layers) / weights,
        bytes=weight_bytes(folder),
        needs_code=needs_code(view.model.config),
        layers=layers,
    )


def cut(view: ModelView) -> Allocation:
    """What is left of every unit of the dense model, to be drawn.

    A granule of attention is a key/value group where every group kept its query heads, else a query head: a picture of
    groups would hide those that are gone.
    """
    dense = read_dense_shape(view.model.config, view.family)
    by_group = all(block.heads * dense.groups == block.groups * dense.heads for block in view.blocks)
    units: list[Unit] = []
    kept: list[int] = []
    for block in view.blocks:
        query, key_value = _head_weights(block)
        name = f"layers.{block.index}.attention"
        if by_group:
            price = key_value + query * dense.heads // dense.groups
            units.append(Unit(name, "attention", block.index, dense.groups, price))
        else:
            units.append(Unit(name, "attention", block.index, dense.heads, query, fixed=dense.groups * key_value))
        units.append(Unit(f"layers.{block.index}.ffn", "ffn", block.index, dense.channels, _channel_weights(block)))
        kept += [block.groups if by_group else block.heads, block.channels]
    return Allocation(tuple(units), tuple(kept))


def masked(view: ModelView) -> Allocation:
    """How many weights of every prunable matrix are not zero."""
    return Allocation(
        view.weight_units, tuple(int(torch.count_nonzero(linear.weight)) for linear in view.prunable.values())
    )


def _head_weights(block: Block) -> tuple[int, int]:
    """Weights of a query head (its rows of q, its columns of o), and of a key/value head (its rows of k and v)."""
    q, k, v, o = (block.linears[role] for role in "qkvo")
    return block.head_dim * (q.in_features + o.out_features), block.head_dim * (k.in_features + v.in_features)


def _channel_weights(block: Block) -> int:
    """Weights of an FFN channel, of all experts where there are several."""
    parts = block.unit_linears("ffn")
    inputs = sum(parts.width[role] * linear.in_features for role, linear in parts.inputs.items())
    return inputs + parts.width[parts.last_role] * parts.last.out_features


def _dense_weights(block: Block, dense: LayerShape) -> int:
    """Weights of the linear projections of a layer of the dense model."""
    query, key_value = _head_weights(block)
    return dense.heads * query + dense.groups * key_value + dense.channels * _channel_weights(block)


def _row(block: Block, dense: LayerShape) -> LayerRow:
    weights = sum(linear.weight.numel() for linear in block.linears.values())
    zeros = sum(int(torch.count_nonzero(linear.weight == 0)) for linear in block.linears.values())
    return LayerRow(
        layer=block.index,
        heads=(block.heads, dense.heads),
        groups=(block.groups, dense.groups),
        channels=(block.channels, dense.channels),
        weights=weights,
        zeros=zeros / weights,
    )
