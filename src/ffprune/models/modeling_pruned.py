"""Causal language models whose decoder layers differ in width, as config.json says under ``per_layer_config``.

A copy of this file stands in every pruned model folder, so that transformers alone can load it: it imports nothing
else. transformers reads and writes such configs, but builds every layer as wide as the config's global values say;
here the layers are narrowed to their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def pruned(base: type[nn.Module], layout: Mapping[str, Any]) -> type[nn.Module]:
    """A class like ``base`` whose layers are as wide as the config's ``per_layer_config`` says.

    Args:
        base: a causal language model of transformers.
        layout: where its linears are: ``layers``, ``attention`` and ``paths`` (role -> path inside a layer), how its
            config calls ``heads``, ``kv_heads`` and ``ffn_width``; ``heads_attribute`` and ``ratio_attribute`` of the
            attention module, or None.
    """

    class Pruned(base):  # type: ignore[misc, valid-type]  # which class that is, is what this function is about
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            narrow(self, widths(config, layout), layout)

    # The name says what the model computes; config.json's "architectures" is read by other tools.
    Pruned.__name__ = Pruned.__qualname__ = base.__name__
    return Pruned


def widths(config: Any, layout: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Query heads, key/value heads and FFN channels of every layer that a config asks for."""
    return [
        (getattr(own, layout["heads"]), getattr(own, layout["kv_heads"]), getattr(own, layout["ffn_width"]))
        for own in config.per_layer_config
    ]


def narrow(model: nn.Module, shapes: Sequence[tuple[int, int, int]], layout: Mapping[str, Any]) -> None:
    """Give the layers of a model that still has its global widths their own, in place; first rows and columns stay.

    Args:
        model: the model, on whatever device, the meta device included.
        shapes: query heads, key/value heads and FFN channels of every layer.
        layout: as for :func:`pruned`.

    Raises:
        ValueError: query heads that do not divide into key/value heads, or more of something than the model has.
    """
    for number, (layer, (heads, groups, channels)) in enumerate(
        zip(model.get_submodule(layout["layers"]).children(), shapes, strict=True)
    ):
        attention: Any = layer.get_submodule(layout["attention"])
        if groups < 1 or heads % groups:
            raise ValueError(f"layer {number} is to have {heads} query heads for {groups} key/value heads")
        query, key = heads * attention.head_dim, groups * attention.head_dim
        sizes = {"q": query, "k": key, "v": key, "o": query, "gate": channels, "up": channels, "down": channels}
        for role, path in layout["paths"].items():
            _narrow_linear(layer.get_submodule(path), sizes[role], role in ("o", "down"), f"layer {number}, {path}")
        if layout["heads_attribute"]:
            setattr(attention, layout["heads_attribute"], heads)
        if layout["ratio_attribute"]:
            setattr(attention, layout["ratio_attribute"], heads // groups)


def _narrow_linear(linear: Any, size: int, columns: bool, name: str) -> None:
    whole = linear.in_features if columns else linear.out_features
    if size > whole:
        raise ValueError(f"{name} is to be {size} wide, and the model's own width is {whole}")
    if size == whole:
        return
    weight = linear.weight[:, :size] if columns else linear.weight[:size]
    linear.weight = _parameter(weight, linear.weight)
    if columns:
        linear.in_features = size
        return
    linear.out_features = size
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[:size], linear.bias)


def _parameter(part: torch.Tensor, whole: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(), requires_grad=whole.requires_grad)
