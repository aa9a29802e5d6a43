"""Fused projections seen as their parts: a linear of its own for every role, in the place of one linear for several.

Statistics, masks, cuts and repair know one linear a role. Families that compute q, k and v (or gate and up) by one
linear, or store a linear's weight transposed (GPT-2's Conv1D), are taken apart when a model is viewed, and put
together again in every file: folders keep the names and layout of the family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffprune.core.errors import UnsupportedArchitecture
from ffprune.models.experts import Mixture
from ffprune.models.families import Family, Fusion
from ffprune.models.linear import linear_of
from ffprune.models.modeling_pruned import part_sizes, query_width


class Parts(nn.Module):
    """What a fused linear computes, by a linear per role; children are named by role.

    Args:
        fused: the family's module; its weights are shared, but copied where they are transposed or rows of several
            roles alternate.
        fusion: how they lie in it.
        query: rows of q, where q is among the roles.
        head: width of a head.
    """

    def __init__(self, fused: nn.Linear | Conv1D, fusion: Fusion, query: int, head: int) -> None:
        super().__init__()
        self.fusion, self._head = fusion, head
        weights = self._split(fused.weight, query)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if fused.bias is not None:
            biases = self._split(fused.bias, query)
        for role, weight, bias in zip(fusion.roles, weights, biases, strict=True):
            self.add_module(role, linear_of(weight, bias))
        self.requires_grad_(fused.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, features in the order of the fused linear."""
        outputs = [linear(x) for linear in self.children()]
        if self.fusion.by_head:
            return torch.stack([output.unflatten(-1, (-1, self._head)) for output in outputs], -2).flatten(-3)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def joined(self, name: str) -> Tensor:
        """``weight`` or ``bias`` of the fused linear, as the family stores it: a new tensor where roles are several."""
        parts = [getattr(linear, name).detach() for linear in self.children()]
        if self.fusion.by_head:
            whole = torch.stack([part.unflatten(0, (-1, self._head)) for part in parts], 1).flatten(0, 2)
        else:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T if self.fusion.transposed and whole.ndim == 2 else whole

    def fused(self) -> nn.Module:
        """The family's own module with the present weights."""
        weight = self.joined("weight")
        bias = None if next(self.children()).bias is None else self.joined("bias")
        grad = next(self.parameters()).requires_grad
        if not self.fusion.transposed:
            return linear_of(weight, bias).requires_grad_(grad)
        with torch.device("meta"):  # no random numbers are drawn for weights that go
            fused = Conv1D(*weight.shape[::-1])  # type: ignore[no-untyped-call]  # of a library
        fused.weight = nn.Parameter(weight)
        fused.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        return fused.requires_grad_(grad)

    def _split(self, stored: Tensor, query: int) -> list[Tensor]:
        tensor = stored.detach()
        rows = tensor.T.contiguous() if self.fusion.transposed and tensor.ndim == 2 else tensor
        if self.fusion.by_head:
            by_head = rows.view(-1, len(self.fusion.roles), self._head, *rows.shape[1:])
            return [part.flatten(0, 1) for part in by_head.unbind(1)]
        return list(torch.split(rows, part_sizes(self.fusion.roles, len(rows), query)))


def take_apart(layer: nn.Module, family: Family) -> None:
    """Put :class:`Parts` in the place of a decoder layer's fused linears, in place; once is enough.

    Raises:
        UnsupportedArchitecture: what should be a fused linear is another module.
        AttributeError: the layer has no such module.
    """
    if not family.fused or isinstance(layer.get_submodule(family.fused[0].path), Parts):
        return
    attention, query = layer.get_submodule(family.attention), query_width(layer, family.layout)
    for fusion in family.fused:
        fused = layer.get_submodule(fusion.path)
        wanted = Conv1D if fusion.transposed else nn.Linear
        if not isinstance(fused, wanted):
            raise UnsupportedArchitecture(
                f"{fusion.path!r} of a {type(layer).__name__} is a {type(fused).__name__}",
                f"Only a {wanted.__name__} can be taken apart into {', '.join(fusion.roles)}",
                "Load the model without quantisation or adapters",
            )
        layer.set_submodule(fusion.path, Parts(fused, fusion, query, int(getattr(attention, family.head_dim))))


@contextmanager
def put_together(model: nn.Module) -> Iterator[None]:
    """While open, a model has its family's own fused linears and experts, whose weights are copies."""
    parts = {path: module for path, module in model.named_modules() if isinstance(module, Parts | Mixture)}
    for path, module in parts.items():
        model.set_submodule(path, module.fused())
    try:
        yield
    finally:
        for path, module in parts.items():
            model.set_submodule(path, module)
