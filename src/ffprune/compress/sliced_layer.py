"""Decoder layers with a narrower residual stream (SliceGPT): norms, skip connections, what families call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffprune.models.view import ModelView


@dataclass(frozen=True)
class Layout:
    """Where one family keeps what the residual stream runs through, beside its linears.

    Attributes:
        embeddings: paths in the model of the tables whose rows are added up at the entrance.
        attention_norm, ffn_norm: names in a decoder layer.
        epsilon: what these norms call their epsilon.
        ffn: names in a decoder layer of the modules that make up its FFN, applied one after the other.
    """

    embeddings: tuple[str, ...]
    attention_norm: str
    ffn_norm: str
    epsilon: str
    ffn: tuple[str, ...]

    def tables(self, view: ModelView) -> list[nn.Embedding]:
        """A model's embeddings."""
        tables = [view.model.get_submodule(path) for path in self.embeddings]
        return [table for table in tables if isinstance(table, nn.Embedding)]


_LLAMA = Layout(
    embeddings=("model.embed_tokens",),
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    epsilon="variance_epsilon",
    ffn=("mlp",),
)

#: The layouts by transformers ``model_type``.
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Layout(
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        epsilon="eps",
        ffn=("fc1", "activation_fn", "fc2"),
    ),
}


class SlicedRMSNorm(nn.Module):
    """RMSNorm without weights, for a signal of which some dimensions were sliced off.

    As in the published code, the mean of squares is over the dense width, as if the missing dimensions were 0, however
    many are left.

    Args:
        width: the dense width.
        epsilon: added to the mean of squares.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to the same, in its dtype, computed in float32."""
        wide = x.float()
        mean = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(mean + self.epsilon)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A pre-norm decoder layer whose two skip connections change the basis of the residual stream.

    It has the modules of the layer it replaces under their names. Dropout on the skip connections (OPT, in training) is
    left out.

    Args:
        layer: the dense layer; its modules are taken over.
        attention: name of its attention module.
        layout: of its family.

    Attributes:
        attention_shortcut, ffn_shortcut: Q_l^T Q_l+1, as linear maps.
    """

    def __init__(self, layer: nn.Module, attention: str, layout: Layout) -> None:
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.attention_shortcut: nn.Module = nn.Identity()
        self.ffn_shortcut: nn.Module = nn.Identity()
        self._attention, self._layout = attention, layout

    def attend(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """First half: ``[b, seqlen, d]`` to what enters the FFN's norm; ``kwargs`` go to the attention."""
        normed = self.get_submodule(self._layout.attention_norm)(hidden)
        mixed, _ = self.get_submodule(self._attention)(hidden_states=normed, **kwargs)
        output: Tensor = self.attention_shortcut(hidden) + mixed
        return output

    def feed(self, hidden: Tensor) -> Tensor:
        """Second half: what :meth:`attend` gives to the layer's output."""
        wide = self.get_submodule(self._layout.ffn_norm)(hidden)
        for name in self._layout.ffn:
            wide = self.get_submodule(name)(wide)
        output: Tensor = self.ffn_shortcut(hidden) + wide
        return output

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``[b, seqlen, d]`` to ``[b, seqlen, d']``; ``kwargs`` are the model's, for the attention."""
        return self.feed(self.attend(hidden_states, **kwargs))


class Attending(nn.Module):
    """The first half of a sliced layer."""

    def __init__(self, layer: SlicedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """:meth:`SlicedLayer.attend`."""
        return self.layer.attend(hidden, **kwargs)
