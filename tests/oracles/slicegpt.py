"""Twin of ffprune.compress.slicegpt: the dense model with its residual stream projected, nothing fused or rotated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.models.view import ModelView


def projected_logits(model: PreTrainedModel, windows: Tensor, width: int, centred: bool) -> Tensor:
    """Logits when the stream is projected to ``width`` principal directions wherever SliceGPT slices it.

    Slicing to Q[:, :width] and going on in that basis is the same as the projection x Q[:, :width] Q[:, :width]^T. The
    stream is projected at the entrance of every layer and between its attention and its FFN; what comes out of the last
    layer is not. Every direction is found on the model with all earlier projections, by running all of it again.

    Args:
        model: dense; its forward pass is changed while this runs.
        windows: int64 ``[n, seqlen]``, calibration text, and the text of the logits.
        width: directions kept.
        centred: the mean over dimensions is taken out of the stream first (LayerNorm models).
    """
    view = ModelView(model)
    projections: list[Tensor] = []
    points = 2 * len(view.blocks)
    signal: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}

    def at(point: int, x: Tensor) -> Tensor:
        if centred:
            x = x - x.mean(-1, keepdim=True)
        signal[point] = x
        return x @ projections[point] if point < len(projections) else x

    def entrance(i: int) -> Callable:
        def hook(_, args: tuple, kwargs: dict) -> tuple:
            entered[i] = at(2 * i, args[0])
            return (entered[i], *args[1:]), kwargs

        return hook

    def between(i: int) -> Callable:
        # The layer adds what it entered with: hand it the difference.
        return lambda _, __, output: (at(2 * i + 1, entered[i] + output[0]) - entered[i], *output[1:])

    hooks = []
    for i, block in enumerate(view.blocks):
        hooks.append(block.layer.register_forward_pre_hook(entrance(i), with_kwargs=True))
        hooks.append(block.attention.register_forward_hook(between(i)))
    with torch.no_grad():
        for point in range(points):
            model(windows, use_cache=False)
            x = signal[point].flatten(0, 1).double()
            q = torch.linalg.svd(x, full_matrices=True).Vh.T[:, :width]
            projections.append((q @ q.T).to(signal[point].dtype))
        logits = model(windows, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits
