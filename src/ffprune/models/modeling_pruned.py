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

GROUPED_WIDTH = 8
"""Channels of an expert come in such steps in torch's grouped product: 16 bytes, and 2 bytes a weight."""


def pruned(base: type[nn.Module], layout: Mapping[str, Any]) -> type[nn.Module]:
    """A class like ``base`` whose layers are as wide as the config's ``per_layer_config`` says.

    Args:
        base: a causal language model of transformers.
        layout: where its ``layers`` and their ``attention`` are; its ``linears`` (path inside a layer -> the roles
            whose rows it has, whether these alternate head by head, whether the weight is transposed); how its config
            calls ``heads``, ``kv_heads`` and ``ffn_width``, and the attention module the width of a head
            (``head_dim``); which ``attributes`` the attention reads; where a layer's ``experts`` are, if it has any.
    """

    class Pruned(base):  # type: ignore[misc, valid-type]  # which class that is, is what this function is about
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            narrow(self, widths(config, layout), layout)

        @classmethod
        def is_custom_code(cls) -> bool:
            """No: tensors are those of transformers' class, whose renamings of older files must hold here too."""
            return False

    # The name says what the model computes; config.json's "architectures" is read by other tools.
    Pruned.__name__ = Pruned.__qualname__ = base.__name__
    return Pruned


def widths(config: Any, layout: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Query heads, key/value heads and FFN channels of every layer that a config asks for."""
    return [
        (getattr(own, layout["heads"]), getattr(own, layout["kv_heads"]), channels(own, layout["ffn_width"]))
        for own in config.per_layer_config
    ]


def channels(config: Any, name: str) -> int:
    """FFN channels that a config asks for: GPT-2 has none written down where they are four times the hidden width."""
    found = getattr(config, name)
    return 4 * int(config.hidden_size) if found is None else int(found)


class LayerConfig:
    """A config as one layer's attention reads it: some settings of its own, all others where the model keeps them.

    Args:
        shared: the model's config.
        own: the layer's settings.
    """

    def __init__(self, shared: Any, own: Mapping[str, Any]) -> None:
        self.__dict__.update(own, shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # what copying asks for before there is anything
            raise AttributeError(name)
        return getattr(self.shared, name)


def tell(attention: Any, layout: Mapping[str, Any], heads: int, groups: int) -> None:
    """Let an attention module know its head counts, in place: query heads, key/value heads."""
    width = heads * getattr(attention, layout["head_dim"])
    facts = {"heads": heads, "groups": groups, "ratio": heads // groups, "width": width}
    for name, fact in layout["attributes"].items():
        if not name.startswith("config."):
            setattr(attention, name, facts[fact])
            continue
        setting = name.removeprefix("config.")
        shared = getattr(attention.config, "shared", attention.config)
        same = vars(shared).get(setting) == facts[fact]
        attention.config = shared if same else LayerConfig(shared, {setting: facts[fact]})


def narrow(model: Any, shapes: Sequence[tuple[int, int, int]], layout: Mapping[str, Any]) -> None:
    """Give the layers of a model that still has its global widths their own, in place; first rows and columns stay.

    Args:
        model: the model, on whatever device, the meta device included.
        shapes: query heads, key/value heads and FFN channels of every layer.
        layout: as for :func:`pruned`.

    Raises:
        ValueError: query heads that do not divide into key/value heads, fewer than none of something, or more than the
            model has.
    """
    for number, (layer, (heads, groups, width)) in enumerate(
        zip(model.get_submodule(layout["layers"]).children(), shapes, strict=True)
    ):
        attention: Any = layer.get_submodule(layout["attention"])
        if heads < 1 or groups < 1 or heads % groups:
            raise ValueError(f"layer {number} is to have {heads} query heads for {groups} key/value heads")
        if width < 0:
            raise ValueError(f"layer {number} is to have {width} FFN channels")
        head = getattr(attention, layout["head_dim"])
        sizes = dict.fromkeys(("gate", "up", "down"), width) | {
            "q": heads * head,
            "k": groups * head,
            "v": groups * head,
            "o": heads * head,
        }
        query = query_width(layer, layout)
        for path, facts in layout["linears"].items():
            linear, roles = layer.get_submodule(path), facts["roles"]
            columns = roles in (("o",), ("down",))
            weight: Any = linear.weight
            whole = weight.shape[int(columns != facts["transposed"])]
            wanted, present = [sizes[role] for role in roles], part_sizes(roles, whole, query)
            if any(size > most for size, most in zip(wanted, present, strict=True)):
                raise ValueError(
                    f"layer {number}, {path} is to be {wanted} wide, and the model's own width is {present}"
                )
            if facts["by_head"]:
                wanted, present = [sum(wanted)], [whole]
            if wanted != present:
                _narrow_linear(linear, present, wanted, columns, facts["transposed"])
        if layout["experts"] is not None:
            experts: Any = layer.get_submodule(layout["experts"])
            whole = experts.down_proj.shape[2]
            if width > whole:
                raise ValueError(
                    f"layer {number}, an expert is to be {width} wide, and the model's own width is {whole}"
                )
            if width < whole:
                _narrow_experts(experts, whole, width)
            # transformers' default product cannot have this width.
            if width % GROUPED_WIDTH and model.config._experts_implementation == "grouped_mm":
                model.set_experts_implementation("eager")
        tell(attention, layout, heads, groups)


def _narrow_experts(experts: Any, present: int, wanted: int) -> None:
    def first(tensor: torch.Tensor, dim: int) -> nn.Parameter:
        pieces = [part.narrow(dim, 0, wanted) for part in torch.split(tensor, present, dim)]
        return nn.Parameter(torch.cat(pieces, dim).detach(), requires_grad=tensor.requires_grad)

    experts.gate_up_proj, experts.down_proj = first(experts.gate_up_proj, 1), first(experts.down_proj, 2)
    experts.intermediate_dim = wanted


def query_width(layer: nn.Module, layout: Mapping[str, Any]) -> int:
    """Width of all query heads of a layer, from the linear that reads them."""
    path, facts = next((path, facts) for path, facts in layout["linears"].items() if facts["roles"] == ("o",))
    weight: Any = layer.get_submodule(path).weight
    return int(weight.shape[0 if facts["transposed"] else 1])


def part_sizes(roles: Sequence[str], rows: int, query: int) -> list[int]:
    """Rows of every role in a linear: q has those of the query heads, k and v (else: all) share the rest."""
    first = query if roles[0] == "q" else rows // len(roles)
    rest = (rows - first) // max(1, len(roles) - 1)
    return [first, *(rest for _ in roles[1:])]


def _narrow_linear(linear: Any, present: list[int], wanted: Sequence[int], columns: bool, transposed: bool) -> None:
    def first(tensor: torch.Tensor, dim: int) -> nn.Parameter:
        parts = torch.split(tensor, present, dim)
        pieces = [part.narrow(dim, 0, size) for part, size in zip(parts, wanted, strict=True)]
        return nn.Parameter(torch.cat(pieces, dim).detach(), requires_grad=tensor.requires_grad)

    linear.weight = first(linear.weight, int(columns != transposed))
    if not columns and linear.bias is not None:
        linear.bias = first(linear.bias, 0)
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    setattr(linear, names[0 if columns else 1], sum(wanted))
