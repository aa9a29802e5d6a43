"""Norms fused into the linears around them: then a rotation of the residual stream changes nothing (SliceGPT, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffprune.compress.sliced_layer import Layout, SlicedRMSNorm
from ffprune.core.units import Kind
from ffprune.models.linear import set_linear
from ffprune.models.view import ModelView


def fuse_norms(view: ModelView, layout: Layout) -> None:
    """Norm weights into the linears behind, LayerNorm's mean into what writes to the residual stream; nothing moves."""
    centred = False
    halves: tuple[tuple[str, Kind], ...] = ((layout.attention_norm, "attention"), (layout.ffn_norm, "ffn"))
    for block in view.blocks:
        for name, kind in halves:
            norm, linears = block.layer.get_submodule(name), block.unit_linears(kind)
            for linear in linears.inputs.values():
                _absorb(linear, norm)
            if isinstance(norm, nn.LayerNorm):
                centred = True
                weight, bias = linears.last.weight.double(), linears.last.bias
                weight = weight - weight.mean(0)
                rewrite(linears.last, weight, None if bias is None else bias.double() - bias.double().mean())
            setattr(block.layer, name, SlicedRMSNorm(view.model.config.hidden_size, getattr(norm, layout.epsilon)))
    if centred:
        for table in layout.tables(view):
            weight = table.weight.double()
            rewrite_table(table, weight - weight.mean(1, keepdim=True))


def _absorb(linear: nn.Linear, norm: nn.Module) -> None:
    """Make a linear do what norm weights (and, of a LayerNorm, biases) did to its input."""
    weight, bias = linear.weight.double(), linear.bias
    shift = getattr(norm, "bias", None)
    if shift is not None:
        bias = weight @ shift.double() + (0 if bias is None else bias.double())
    scale = getattr(norm, "weight", None)
    rewrite(linear, weight if scale is None else weight * scale.double(), bias)


def rewrite(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Replace what a linear computes, whatever its shape, in the dtype that it has."""
    dtype = linear.weight.dtype
    set_linear(linear, _plain(weight, dtype), None if bias is None else _plain(bias, dtype))


def rewrite_table(table: nn.Embedding, weight: Tensor) -> None:
    """Replace the rows of embeddings, whatever their width, in the dtype that they have."""
    table.weight = nn.Parameter(_plain(weight, table.weight.dtype), requires_grad=False)
    table.embedding_dim = weight.shape[1]


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()
