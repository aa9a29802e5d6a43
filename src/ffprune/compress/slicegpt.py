"""A narrower residual stream, cut along its principal directions (SliceGPT, Ashkboos et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.rotation import principal_basis, second_moment
from ffprune.core.units import Kind
from ffprune.models.blocks import BlockWalk
from ffprune.models.view import Block, ModelView
from ffprune.models.walk import check_windows


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


@dataclass(frozen=True)
class Facts:
    """What became of a model; parameters are those stored, biases and norms included.

    Attributes:
        hidden: width of the dense residual stream.
        dimensions: its width now.
        decoder_before, decoder_after: parameters of the decoder layers, shortcut matrices included.
        shortcuts: parameters of the shortcut matrices.
        embeddings_before, embeddings_after: parameters of token and position embeddings.
        head_before, head_after: parameters of the LM head; 0 while it is tied to the embeddings.
        params_before, params_after: parameters of the whole model.
        decoder_removed: share of the decoder's stored parameters that went; below 0 where shortcuts cost more than
            slicing saves.
    """

    hidden: int
    dimensions: int
    decoder_before: int
    decoder_after: int
    shortcuts: int
    embeddings_before: int
    embeddings_after: int
    head_before: int
    head_after: int
    params_before: int
    params_after: int
    decoder_removed: float


def dimensions(hidden: int, sparsity: float, round_to: int = 8) -> int:
    """Width of the residual stream that a "sparsity" means in SliceGPT: (1 - sparsity) hidden, rounded down.

    Because of the shortcut matrices, fewer of the parameters go than that.

    Args:
        hidden: dense width.
        sparsity: share of the width to go, in [0, 1).
        round_to: the width is a multiple of it (the published default, 8).

    Raises:
        ParameterError: a sparsity out of range, or one that leaves no width at all.
    """
    if not 0 <= sparsity < 1:
        raise ParameterError(f"Sparsity {sparsity} was asked for", "Sparsity is in [0, 1)", "Change the sparsity")
    width = int((1 - sparsity) * hidden + 1e-9) // round_to * round_to  # 1 - 0.9 is just below 0.1
    if width == 0:
        raise ParameterError(
            f"Sparsity {sparsity} was asked for in a residual stream of width {hidden}",
            f"Rounded down to a multiple of {round_to}, no dimension is left",
            "Lower the sparsity or the multiple",
        )
    return width


def check(view: ModelView) -> None:
    """Refuse models that cannot be rotated, before any work.

    Raises:
        UnsupportedArchitecture: no layout for the family, norms after the blocks, embeddings of another width than the
            residual stream, no norm before the head, or a model that was sliced before.
    """
    config = view.model.config
    if config.model_type not in LAYOUTS:
        raise UnsupportedArchitecture(
            f"SliceGPT was asked for on a model of type {config.model_type!r}",
            f"Its residual stream is known for {', '.join(LAYOUTS)}",
            "Choose another method, or add a row to LAYOUTS in ffprune/compress/slicegpt.py",
        )
    # Settings that OPT alone has.
    if not getattr(config, "do_layer_norm_before", True):
        raise _unsupported(
            "whose norms follow its blocks (do_layer_norm_before is false)",
            "Norms must precede the blocks: one on the residual stream itself does not commute with rotations",
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise _unsupported(
            f"whose embeddings are {config.word_embed_proj_dim} wide in a residual stream of {config.hidden_size}",
            "Embeddings enter the residual stream, and leave it, without a projection",
        )
    if getattr(config, "_remove_final_layer_norm", False):
        raise _unsupported(
            "without a norm before its head (_remove_final_layer_norm is true)",
            "Only a norm takes out the mean that must be subtracted from the signal beforehand",
        )
    if any(isinstance(block.layer, SlicedLayer) for block in view.blocks):
        raise _unsupported("that was sliced before", "A model can be sliced once")


def compress(
    view: ModelView,
    width: int,
    windows: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Facts:
    """Slice the residual stream of a model, in place.

    Norm weights go into the linears behind them; for LayerNorm, so do biases, and the mean is taken out of everything
    that writes to the residual stream (3.2). From then on a rotation of the stream changes nothing. At the entrance and
    between any two blocks the stream is rotated to its own principal directions, found on a signal that earlier
    slices have already changed, and all but the first ``width`` are sliced off. Behind the last block it returns to its
    dense basis and width, as in the published code, whose last rotation is left out since it changes nothing: the
    final norm and the head stay as they are, but a tied head has to be stored by itself from now on.

    With ``width`` the dense width, the model computes what it did. The published code does not quite: it takes the
    mean out of the embeddings of RMSNorm models as well.

    ``model.config`` keeps the dense width, from which transformers derives others; its head is marked as not tied.

    Args:
        view: the dense model's view.
        width: of the residual stream, 1 to the dense width; see :func:`dimensions`.
        windows: int64 ``[n, seqlen]``, calibration text.
        batch_size: windows a forward pass.
        progress: told of layers done and in all.

    Raises:
        UnsupportedArchitecture: see :func:`check`.
        ParameterError: a width out of range, or no windows.
        NonFiniteLoss: a signal is not finite.
    """
    check(view)
    check_windows(windows, batch_size)
    model, layout = view.model, LAYOUTS[view.family.model_type]
    hidden = int(model.config.hidden_size)
    if not 1 <= width <= hidden:
        raise ParameterError(
            f"A residual stream of width {width} was asked for",
            f"The model's is {hidden} wide",
            f"Choose a width of 1 to {hidden}",
        )
    decoder, embeddings, head, whole = _sizes(view, layout)
    with torch.no_grad():
        _fuse_norms(view, layout)
        walk = BlockWalk(view, windows, batch_size)
        # The head keeps the table that the embeddings give up here.
        model.config.tie_word_embeddings = False
        basis = principal_basis(second_moment(walk.hidden))[:, :width]
        for table in _tables(view, layout):
            table.weight = _parameter(table.weight.double() @ basis, table.weight.dtype)
            table.embedding_dim = width
        for block in view.blocks:
            layer = SlicedLayer(block.layer, view.family.attention, layout)
            middle, basis = _slice_attention(walk, block, layer, basis)
            if block is not view.blocks[-1]:
                basis = _slice_output(walk, block, layer, middle, basis)
            if progress is not None:
                progress(block.index + 1, len(view.blocks))
    layers = [module for module in model.modules() if isinstance(module, SlicedLayer)]
    shortcuts = [shortcut for layer in layers for shortcut in (layer.attention_shortcut, layer.ffn_shortcut)]
    decoder_now, embeddings_now, head_now, whole_now = _sizes(view, layout)
    return Facts(
        hidden=hidden,
        dimensions=width,
        decoder_before=decoder,
        decoder_after=decoder_now,
        shortcuts=sum(map(_params, shortcuts)),
        embeddings_before=embeddings,
        embeddings_after=embeddings_now,
        head_before=head,
        head_after=head_now,
        params_before=whole,
        params_after=whole_now,
        decoder_removed=1 - decoder_now / decoder,
    )


def _unsupported(what: str, possible: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"SliceGPT was asked for on a model {what}", possible, "Choose another method or model"
    )


def _fuse_norms(view: ModelView, layout: Layout) -> None:
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
                _set(linears.last, weight, None if bias is None else bias.double() - bias.double().mean())
            setattr(block.layer, name, SlicedRMSNorm(view.model.config.hidden_size, getattr(norm, layout.epsilon)))
    if centred:
        for table in _tables(view, layout):
            weight = table.weight.double()
            table.weight = _parameter(weight - weight.mean(1, keepdim=True), table.weight.dtype)


def _absorb(linear: nn.Linear, norm: nn.Module) -> None:
    """Make a linear do what norm weights (and, of a LayerNorm, biases) did to its input."""
    weight, bias = linear.weight.double(), linear.bias
    shift = getattr(norm, "bias", None)
    if shift is not None:
        bias = weight @ shift.double() + (0 if bias is None else bias.double())
    scale = getattr(norm, "weight", None)
    _set(linear, weight if scale is None else weight * scale.double(), bias)


def _slice_attention(walk: BlockWalk, block: Block, layer: SlicedLayer, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Install a layer whose input comes in ``basis`` and put the signal before its FFN into a basis of its own.

    Args:
        walk: at this layer; ``hidden`` is in the dense basis, not yet sliced.
        block: the layer's block, which gets the new layer.
        layer: the new layer; its output is left in the dense basis.
        basis: float64 ``[hidden, width]``.

    Returns:
        The signal before the FFN ``[n, seqlen, hidden]``, in the dense basis, not yet sliced; and the basis for it.
    """
    dtype = walk.hidden.dtype
    attention, ffn = block.unit_linears("attention"), block.unit_linears("ffn")
    for linear in attention.inputs.values():
        _set(linear, linear.weight.double() @ basis, linear.bias)
    layer.attention_shortcut = _shortcut(basis.T, dtype)  # to the dense basis, until the next is known
    block.layer = _Attending(layer)
    entrance = basis.to(dtype)
    middle = torch.cat([walk.forward(walk.hidden[rows] @ entrance, i) for i, rows in enumerate(walk.batches)])
    block.layer = layer
    walk.view.model.get_submodule(walk.view.family.layers).register_module(str(block.index), layer)

    following = principal_basis(second_moment(middle))[:, : basis.shape[1]]
    layer.attention_shortcut = _shortcut(basis.T @ following, dtype)
    _rotate_output(attention.last, following)
    for linear in ffn.inputs.values():
        _set(linear, linear.weight.double() @ following, linear.bias)
    layer.ffn_shortcut = _shortcut(following.T, dtype)
    return middle, following


def _slice_output(walk: BlockWalk, block: Block, layer: SlicedLayer, middle: Tensor, basis: Tensor) -> Tensor:
    """Put the output of a layer into a basis of its own; the walk goes on to the next layer.

    Args:
        walk: at this layer; ``hidden`` becomes its output, in the dense basis, not yet sliced.
        block: the layer's block.
        layer: the layer, as :func:`_slice_attention` leaves it.
        middle: ``[n, seqlen, hidden]``, the signal before the FFN, in the dense basis, not yet sliced.
        basis: float64 ``[hidden, width]``, for that signal.

    Returns:
        The basis for the output.
    """
    dtype = middle.dtype
    entrance = basis.to(dtype)
    outputs = torch.cat([layer.feed(middle[rows] @ entrance) for rows in walk.batches])
    following = principal_basis(second_moment(outputs))[:, : basis.shape[1]]
    layer.ffn_shortcut = _shortcut(basis.T @ following, dtype)
    _rotate_output(block.unit_linears("ffn").last, following)
    walk.advance(outputs)
    return following


class _Attending(nn.Module):
    """The first half of a sliced layer."""

    def __init__(self, layer: SlicedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return self.layer.attend(hidden, **kwargs)


def _rotate_output(linear: nn.Linear, basis: Tensor) -> None:
    bias = None if linear.bias is None else basis.T @ linear.bias.double()
    _set(linear, basis.T @ linear.weight.double(), bias)


def _shortcut(matrix: Tensor, dtype: torch.dtype) -> nn.Linear:
    """x -> x matrix, as a linear so that its multiplications are counted."""
    linear = nn.Linear(1, 1, bias=False, device="meta", dtype=dtype)
    _set(linear, matrix.T, None)
    return linear


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    dtype = linear.weight.dtype
    linear.weight = _parameter(weight, dtype)
    linear.register_parameter("bias", None if bias is None else _parameter(bias, dtype))
    linear.out_features, linear.in_features = weight.shape


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)


def _tables(view: ModelView, layout: Layout) -> list[nn.Embedding]:
    tables = [view.model.get_submodule(path) for path in layout.embeddings]
    return [table for table in tables if isinstance(table, nn.Embedding)]


def _sizes(view: ModelView, layout: Layout) -> tuple[int, int, int, int]:
    """Parameters of the decoder layers, of the embeddings, of a head of its own, and of the whole model."""
    tables = _tables(view, layout)
    head = view.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    own = [] if any(head.weight is table.weight for table in tables) else [head]
    layers = [block.layer for block in view.blocks]
    decoder, embeddings, heads = (sum(map(_params, modules)) for modules in (layers, tables, own))
    return decoder, embeddings, heads, _params(view.model)


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
