"""How much an error in a linear map's output matters: the Fisher curvature of the loss there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ffprune.core.errors import NonFiniteLoss
from ffprune.models.view import ModelView


@dataclass(frozen=True)
class Curvature:
    """trace(C) of one linear map's output.

    Attributes:
        mean: nats per squared unit of output, per token.
        stderr: standard error over windows.
    """

    mean: float
    stderr: float


def output_curvature(
    view: ModelView,
    maps: Sequence[nn.Module],
    windows: Tensor,
    batch_size: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> list[Curvature]:
    """E ||d(-log p(y)) / d(output)||^2 per map, labels y drawn from the model itself.

    This is the trace of the Fisher matrix, which is the Gauss-Newton Hessian of the cross-entropy (K-FAC, Martens and
    Grosse 2015): positive, and exact for the divergence from the dense model. One backward pass serves all maps.

    Args:
        view: the dense model; its parameters need no gradients.
        maps: linear maps of the model: the last of every unit, or all prunable ones.
        windows: int64 ``[n, seqlen]``.
        batch_size: windows at a time.
        generator: of the labels.
        progress: told of windows done and in all.

    Returns:
        One estimate per map.

    Raises:
        NonFiniteLoss: a gradient is not finite.
    """
    sums = torch.zeros(len(maps), len(windows), dtype=torch.float64)
    rows = slice(0, 0)

    def keep(index: int, module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(partial(store, index))  # type: ignore[no-untyped-call]

    def store(index: int, gradient: Tensor) -> None:
        # OPT runs its FFN on [windows * seqlen, width].
        sums[index, rows] = gradient.double().square().view(rows.stop - rows.start, -1).sum(1).cpu()

    hooks = [module.register_forward_hook(partial(keep, i)) for i, module in enumerate(maps)]
    try:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            rows = slice(start, start + len(batch))
            embedded = view.model.get_input_embeddings()(batch).detach().requires_grad_(True)
            logits = view.model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            shares = logits.detach().softmax(-1)
            labels = torch.multinomial(shares, 1, generator=generator).flatten()
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            if progress is not None:
                progress(rows.stop, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    sums /= windows.shape[1] - 1
    if not torch.isfinite(sums).all():
        raise NonFiniteLoss(
            "the gradient of the loss is not finite at some linear map",
            "a finite loss is needed to compare maps",
            "Change compute.dtype to float32 or bfloat16",
        )
    spread = sums.std(1) / math.sqrt(len(windows)) if len(windows) > 1 else torch.full((len(sums),), math.inf)
    return [Curvature(float(m), float(s)) for m, s in zip(sums.mean(1), spread, strict=True)]
