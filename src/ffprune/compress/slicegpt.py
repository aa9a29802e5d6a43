"""A narrower residual stream, cut along its principal directions (SliceGPT, Ashkboos et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffprune.compress.fusion import fuse_norms, rewrite, rewrite_table
from ffprune.compress.sliced_layer import LAYOUTS, Attending, Layout, SlicedLayer
from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.rotation import principal_basis, second_moment
from ffprune.models.blocks import BlockWalk
from ffprune.models.linear import linear_of
from ffprune.models.surgery import param_count
from ffprune.models.view import Block, ModelView
from ffprune.models.watch import check_windows


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
            "Choose another method, or add a row to LAYOUTS in ffprune/compress/sliced_layer.py",
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
    view: ModelView, width: int, windows: Tensor, batch_size: int, progress: Callable[[int, int], None] | None = None
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
    before = _sizes(view, layout, "before")
    with torch.no_grad():
        fuse_norms(view, layout)
        walk = BlockWalk(view, windows, batch_size)
        # The head keeps the table that the embeddings give up here.
        model.config.tie_word_embeddings = False
        basis = principal_basis(second_moment(walk.hidden.to(walk.arrive())))[:, :width]
        for table in layout.tables(view):
            rewrite_table(table, table.weight.double() @ basis)
        for block in view.blocks:
            layer = SlicedLayer(block.layer, view.family.attention, layout)
            middle, basis = _slice_attention(walk, block, layer, basis)
            if block is not view.blocks[-1]:
                basis = _slice_output(walk, block, layer, middle, basis)
            if progress is not None:
                progress(block.index + 1, len(view.blocks))
    layers = [module for module in model.modules() if isinstance(module, SlicedLayer)]
    shortcuts = [shortcut for layer in layers for shortcut in (layer.attention_shortcut, layer.ffn_shortcut)]
    after = _sizes(view, layout, "after")
    removed = 1 - after["decoder_after"] / before["decoder_before"]
    stored = sum(map(param_count, shortcuts))
    return Facts(hidden=hidden, dimensions=width, shortcuts=stored, decoder_removed=removed, **before, **after)


def _unsupported(what: str, possible: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"SliceGPT was asked for on a model {what}", possible, "Choose another method or model"
    )


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
        rewrite(linear, linear.weight.double() @ basis, linear.bias)
    layer.attention_shortcut = _shortcut(basis.T, dtype)  # to the dense basis, until the next is known
    block.layer = Attending(layer)
    entrance = basis.to(dtype)
    middle = torch.cat(
        [walk.forward(walk.hidden[rows].to(entrance.device) @ entrance, i) for i, rows in enumerate(walk.batches)]
    )
    block.layer = layer
    walk.view.model.get_submodule(walk.view.family.layers).register_module(str(block.index), layer)

    following = principal_basis(second_moment(middle))[:, : basis.shape[1]]
    layer.attention_shortcut = _shortcut(basis.T @ following, dtype)
    _rotate_output(attention.last, following)
    for linear in ffn.inputs.values():
        rewrite(linear, linear.weight.double() @ following, linear.bias)
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


def _rotate_output(linear: nn.Linear, basis: Tensor) -> None:
    bias = None if linear.bias is None else basis.T @ linear.bias.double()
    rewrite(linear, basis.T @ linear.weight.double(), bias)


def _shortcut(matrix: Tensor, dtype: torch.dtype) -> nn.Linear:
    """x -> x matrix, as a linear so that its multiplications are counted."""
    return linear_of(matrix.T.detach().to(dtype).contiguous())


def _sizes(view: ModelView, layout: Layout, when: str) -> dict[str, int]:
    """Parameters of the decoder layers, of the embeddings, of a head of its own, and of the whole model."""
    tables = layout.tables(view)
    head = view.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    own = [] if any(head.weight is table.weight for table in tables) else [head]
    layers = [block.layer for block in view.blocks]
    parts: dict[str, Sequence[nn.Module]] = {
        "decoder": layers,
        "embeddings": tables,
        "head": own,
        "params": [view.model],
    }
    return {f"{name}_{when}": sum(map(param_count, modules)) for name, modules in parts.items()}
