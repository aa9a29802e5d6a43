"""Shapes per layer in a model's config, by transformers' own ``per_layer_config`` convention.

The global values stay those of the dense model, since transformers derives the head width and validates
the hidden size from them; only layers that differ get an override. transformers 5.23 stores such configs
but builds every layer from the global values, hence :func:`resize`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ffprune.models.families import Family
from ffprune.models.view import Block, ModelView


@dataclass(frozen=True)
class LayerShape:
    """What pruning may change in one decoder layer.

    Attributes:
        heads: query heads.
        groups: key/value heads.
        channels: FFN channels.
    """

    heads: int
    groups: int
    channels: int


def read_layer_config(config: PretrainedConfig, family: Family) -> list[LayerShape]:
    """The shape of every decoder layer that a config asks for."""
    return [
        LayerShape(getattr(c, family.heads), getattr(c, family.kv_heads), getattr(c, family.ffn_width))
        for c in config.per_layer_config
    ]


def write_layer_config(config: PretrainedConfig, view: ModelView) -> None:
    """Bring a config of a view's model up to date, in place, with the present shapes of the layers.

    It ends up without ``per_layer_config`` when all layers have the global shape.
    """
    family = view.family
    config.per_layer_config = None
    overrides: dict[int | str, dict[str, Any]] = {}
    for block in view.blocks:
        present = {
            family.kv_heads: block.groups,
            family.heads: block.groups * block.heads_per_group,
            family.ffn_width: block.channels,
        }
        if changed := {name: value for name, value in present.items() if value != getattr(config, name)}:
            overrides[block.index] = changed
    # Without this permission transformers cannot even validate, hence neither save nor load, such a config.
    config.allow_global_per_layer_attribute_access = bool(overrides)
    if overrides:
        config.per_layer_config = overrides


def resize(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> None:
    """Give the layers of a model without weights (on the meta device) their own shapes, in place.

    Raises:
        UnsupportedArchitecture: a layer's query heads do not divide into its key/value groups.
    """
    for block, shape in zip(ModelView(model).blocks, shapes, strict=True):
        sizes = _sizes(block, shape)
        for role, linear in block.linears.items():
            if role in ("o", "down"):
                linear.in_features = sizes[role]
            else:
                linear.out_features = sizes[role]
                if linear.bias is not None:
                    linear.bias = nn.Parameter(torch.empty(sizes[role], device="meta"))
            linear.weight = nn.Parameter(
                torch.empty(linear.out_features, linear.in_features, device="meta"),
            )
    for block in ModelView(model).blocks:
        block.sync_heads()


def _sizes(block: Block, shape: LayerShape) -> dict[str, int]:
    query, key = shape.heads * block.head_dim, shape.groups * block.head_dim
    sizes = dict.fromkeys(("gate", "up", "down"), shape.channels)
    return {"q": query, "k": key, "v": key, "o": query, **sizes}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warning that a heterogeneous config's global values are being read.

    Its own validation reads them at every save and load; nobody can act on the warning.
    """
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
