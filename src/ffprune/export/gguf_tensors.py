"""The tensors of a GGUF file of a Llama, under llama.cpp's names and in its order of rows and widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffprune.models.view import ModelView

BLOCK = 32
"""Weights of a row that are quantised together."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: the parameter that it is, its shape there, and how to make it."""

    name: str
    parameter: Tensor
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def llama_entries(view: ModelView, multiple: int) -> Iterator[Entry]:
    """All tensors, under llama.cpp's names; FFN widths filled up to a multiple of ``multiple``, 0 to 32."""
    model: Any = view.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield _plain("token_embd.weight", embedding)
    for block in view.blocks:
        start, layer = f"blk.{block.index}", block.layer
        yield _plain(f"{start}.attn_norm.weight", layer.get_parameter("input_layernorm.weight"))
        heads = {"q": block.heads, "k": block.groups}
        width = -(-block.channels // multiple) * multiple or BLOCK
        for role, linear in block.linears.items():
            end = {"o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}.get(role, f"attn_{role}")
            for part, tensor in _parts(linear):
                name = f"{start}.{end}.{part}"
                if role in heads:
                    yield Entry(name, tensor, tuple(tensor.shape), partial(_neighbours, tensor, heads[role]))
                elif role in "qkvo" or (role, part) == ("down", "bias"):
                    yield _plain(name, tensor)
                else:
                    yield _filled(name, tensor, int(role == "down"), width)
        yield _plain(f"{start}.ffn_norm.weight", layer.get_parameter("post_attention_layernorm.weight"))
    yield _plain("output_norm.weight", model.get_parameter(f"{model.base_model_prefix}.norm.weight"))
    if head is not embedding:
        yield _plain("output.weight", head)
    if (factors := _rope_factors(model)) is not None:
        yield _plain("rope_freqs.weight", factors)


def _parts(linear: nn.Linear) -> Iterator[tuple[str, Tensor]]:
    yield "weight", linear.weight
    if linear.bias is not None:
        yield "bias", linear.bias


def _plain(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor, tuple(tensor.shape), lambda: tensor)


def _filled(name: str, tensor: Tensor, dim: int, width: int) -> Entry:
    """A tensor whose ``dim`` is filled up with zeros."""
    shape = list(tensor.shape)
    missing, shape[dim] = width - shape[dim], width
    # torch counts dimensions to pad from the last one.
    sides = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
    return Entry(name, tensor, tuple(shape), lambda: nn.functional.pad(tensor, sides) if missing else tensor)


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of q or k with those that rotate together next to each other, in every head."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(model: Any) -> Tensor | None:
    """``[head_dim / 2]`` float32: what the plain rotary frequencies are divided by; None: by nothing."""
    if model.config.rope_parameters["rope_type"] == "default":
        return None
    scaled: Tensor = model.get_submodule(f"{model.base_model_prefix}.rotary_emb").inv_freq.float()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return float(model.config.rope_parameters["rope_theta"]) ** -steps / scaled
