"""Shapes per layer in a model's config, by transformers' own ``per_layer_config`` convention.

The global values stay those of the dense model, since transformers derives the head width and validates
the hidden size from them; only layers that differ get an override. transformers 5.23 stores such configs
but builds every layer from the global values, hence :mod:`ffprune.models.modeling_pruned`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ffprune.models.families import Family
from ffprune.models.modeling_pruned import GROUPED_WIDTH, channels, widths
from ffprune.models.view import ModelView


class LayerShape(NamedTuple):
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
    return [LayerShape(*shape) for shape in widths(config, family.layout)]


def write_layer_config(config: PretrainedConfig, view: ModelView) -> None:
    """Bring a config of a view's model up to date, in place, with the present shapes of the layers.

    It ends up without ``per_layer_config`` when all layers have the global shape.
    """
    shapes = [LayerShape(block.heads, block.groups, block.channels) for block in view.blocks]
    write_shapes(config, view.family, shapes)


def write_shapes(config: PretrainedConfig, family: Family, shapes: Sequence[LayerShape]) -> None:
    """:func:`write_layer_config` for shapes that are known without a view."""
    config.per_layer_config = None
    usual = {
        family.kv_heads: getattr(config, family.kv_heads),
        family.heads: getattr(config, family.heads),
        family.ffn_width: channels(config, family.ffn_width),
    }
    overrides: dict[int | str, dict[str, Any]] = {}
    for index, shape in enumerate(shapes):
        present = {family.kv_heads: shape.groups, family.heads: shape.heads, family.ffn_width: shape.channels}
        if changed := {name: value for name, value in present.items() if value != usual[name]}:
            overrides[index] = changed
    # Without this permission transformers cannot even validate, hence neither save nor load, such a config.
    config.allow_global_per_layer_attribute_access = bool(overrides)
    if overrides:
        config.per_layer_config = overrides


def settle(config: PretrainedConfig, family: Family) -> None:
    """Where all layers have the same shape, make it the global one, in place: a stock model, which needs no code.

    The width of a head must then be written down (it is else derived from their number), and transformers wants the
    hidden width to be a multiple of the heads.
    """
    shapes = read_layer_config(config, family)
    shape, same = shapes[0], len(set(shapes)) == 1
    # An odd width of experts needs our class, which keeps transformers from a product that cannot have it.
    if family.experts is not None and shape.channels % GROUPED_WIDTH:
        return
    explicit = getattr(config, "head_dim", None) is not None and config.hidden_size % shape.heads == 0
    if same and (explicit or shape.heads == getattr(config, family.heads)):
        config.per_layer_config = None
        config.allow_global_per_layer_attribute_access = False
        for name, value in zip((family.heads, family.kv_heads, family.ffn_width), shape, strict=True):
            setattr(config, name, value)


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Silence the warnings of a logger."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def quiet_transformers() -> AbstractContextManager[None]:
    """Silence transformers' warning that a heterogeneous config's global values are being read.

    Its own validation reads them at every save and load; nobody can act on the warning.
    """
    return quiet("transformers.integrations.heterogeneity.configuration_utils")
