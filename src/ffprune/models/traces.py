"""The Hessian trace of every prunable matrix of a model (MS Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ffprune.core.hutchinson import Product, TraceEstimate, hessian_traces
from ffprune.models.view import ModelView


def matrix_traces(
    view: ModelView,
    windows: Tensor,
    batch_size: int,
    probes: int,
    product: Product,
    generator: torch.Generator,
    on_loss: Callable[[], None] = lambda: None,
) -> dict[str, TraceEstimate]:
    """Traces of the Hessian of the cross-entropy, by Hutchinson's estimator.

    The model runs with eager attention meanwhile, for the fused kernels cannot be differentiated twice.

    Args:
        view: the dense model's view; float32 is meant.
        windows: int64 ``[n, seqlen]``.
        batch_size: windows a loss.
        probes: Gaussian vectors, 2 or more.
        product: ``exact`` or ``finite_difference``.
        generator: of the probes, on the CPU.
        on_loss: called whenever a loss is computed.

    Returns:
        Name of ``view.prunable`` -> estimate with its standard error.

    Raises:
        FfpruneError: see :func:`ffprune.core.hutchinson.hessian_traces`.
    """
    weights: dict[str, Tensor] = {name: linear.weight for name, linear in view.prunable.items()}

    def loss(batch: Tensor) -> Tensor:
        on_loss()
        logits = view.model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch[:, 1:].flatten())

    losses = [partial(loss, batch) for batch in torch.split(windows.to(view.model.device), batch_size)]
    implementation = view.model.config._attn_implementation
    view.model.set_attn_implementation("eager")
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        return hessian_traces(losses, weights, probes, generator, product)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
        view.model.set_attn_implementation(implementation)
