"""Shapes per layer in a model's config, by transformers' own ``per_layer_config`` convention.

The global values stay those of the dense model, since transformers derives the head width and validates
the hidden size from them; only layers that differ get an override. transformers 5.23 stores such configs
but builds every layer from the global values, hence :mod:`ffprune.models.modeling_pruned`.

Where all layers have become alike the global values are theirs, and nothing else would say what the model was cut from:
the dense widths stand in a key of our own, :data:`DENSE_KEY`, which transformers keeps and does not read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ffprune.models.families import Family
from ffprune.models.modeling_pruned import GROUPED_WIDTH, channels, widths
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel

DENSE_KEY = "ffprune_dense"
"""In config.json: the fields of :class:`LayerShape`, of a layer of the dense model; in pruned models alone."""


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


def read_dense_shape(config: PretrainedConfig, family: Family) -> LayerShape:
    """A layer's shape in the dense model that a config's model was cut from; where none is told, the global one.

    Raises:
        CorruptModel: what is told is no shape.
    """
    return dense_shape_told(config) or _global_shape(config, family)


def dense_shape_told(config: PretrainedConfig) -> LayerShape | None:
    """A layer's shape in the dense model, as a config of a pruned model tells it; else None.

    Raises:
        CorruptModel: what is told is no shape.
    """
    told = getattr(config, DENSE_KEY, None)
    if told is None:
        return None
    names = LayerShape._fields
    # bool is an int to Python, and not to JSON.
    if not isinstance(told, Mapping) or set(told) != set(names) or any(type(told[n]) is not int for n in names):
        raise _bad_dense(f"is {told!r}")
    return LayerShape(**told)


def write_shapes(config: PretrainedConfig, family: Family, shapes: Sequence[LayerShape]) -> None:
    """:func:`write_layer_config` for shapes that are known without a view.

    Raises:
        CorruptModel: a layer is wider than the dense model's layers, as the config tells them.
    """
    config.per_layer_config = None
    _write_dense(config, read_dense_shape(config, family), shapes)
    whole = _global_shape(config, family)
    usual = {family.kv_heads: whole.groups, family.heads: whole.heads, family.ffn_width: whole.channels}
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


def _global_shape(config: PretrainedConfig, family: Family) -> LayerShape:
    return LayerShape(
        getattr(config, family.heads), getattr(config, family.kv_heads), channels(config, family.ffn_width)
    )


def _write_dense(config: PretrainedConfig, dense: LayerShape, shapes: Sequence[LayerShape]) -> None:
    """Tell the dense shape if any layer differs from it."""
    for index, shape in enumerate(shapes):
        if any(now > whole for now, whole in zip(shape, dense, strict=True)):
            raise _bad_dense(f"is {dense._asdict()}, and layer {index} has {shape._asdict()}")
    if any(shape != dense for shape in shapes):
        setattr(config, DENSE_KEY, dense._asdict())
    elif hasattr(config, DENSE_KEY):
        delattr(config, DENSE_KEY)


def _bad_dense(found: str) -> CorruptModel:
    return CorruptModel(
        f"{DENSE_KEY} in config.json {found}",
        f"It tells {', '.join(LayerShape._fields)} of the dense model's layers, no fewer than there are now",
        "Correct it, or take it out: nothing but descriptions reads it",
    )


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
