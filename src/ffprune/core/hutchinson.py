"""Traces of the loss's Hessian, one per parameter, by Hutchinson's estimator (MS Eq. 5-6, METHODS 6)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss, ParameterError

Loss = Callable[[], Tensor]
Product = Literal["exact", "finite_difference"]


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of trace(H) for one parameter.

    Attributes:
        mean: mean over probes. MS's sensitivity is this over the parameter's number of weights.
        stderr: standard error of the mean over probes.
        samples: v^T H v, one number a probe.
    """

    mean: float
    stderr: float
    samples: list[float]


def hessian_traces(
    losses: Loss | Sequence[Loss],
    parameters: Mapping[str, Tensor],
    probes: int,
    generator: torch.Generator,
    product: Product = "exact",
    step: float = 1e-3,
) -> dict[str, TraceEstimate]:
    """trace(H_ii) for each parameter i, H the Hessian of the mean loss (MS Eq. 5, METHODS 6).

    Each probe draws one standard Gaussian vector v over *all* parameters and uses v_i^T (H v)_i, whose mean
    is trace(H_ii): one Hessian-vector product serves every parameter. What the other parameters' part of v
    adds has mean zero and is part of the reported standard error.

    ``exact`` differentiates twice and needs operations that can be (eager attention).
    ``finite_difference`` takes two gradients, at theta +- eps v with eps = ``step`` times the root mean
    square of all of theta; it costs one saved copy of the parameters, which are changed in place and
    restored bit by bit, also after an error.

    Args:
        losses: a closure, or one per batch, each giving a scalar loss with a fresh graph. Batches are
            evaluated one at a time and averaged with equal weight, so they should have equal token counts,
            and must be deterministic (no dropout).
        parameters: name -> leaf tensor that requires grad, all on one device or several.
        probes: number of Gaussian vectors, 2 or more.
        generator: source of the probes, advanced; the same seed gives both products the same probes.
        product: how H v is computed.
        step: relative size of the finite difference; ``exact`` does not read it.

    Returns:
        name -> estimate, in the order of ``parameters``.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        ParameterError: unknown product, fewer than 2 probes, a step that is not positive, or a finite
            difference in 16-bit parameters, which would round it away.
        ValueError: no losses, no parameters, or a parameter that does not require grad.
    """
    batches = [losses] if callable(losses) else list(losses)
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if not batches or not parameters or frozen:
        raise ValueError(
            f"{len(batches)} losses and {len(parameters)} parameters were given, without grad: {frozen}; "
            "need one or more of both, and parameters that require grad"
        )
    if product not in get_args(Product):
        raise ParameterError(
            f"product {product!r} was asked for",
            f"Known products: {', '.join(get_args(Product))}",
            "Change the product",
        )
    if probes < 2:
        raise ParameterError(f"{probes} probes were asked for", "A standard error needs 2 or more", "Raise the probes")
    tensors = list(parameters.values())
    if product == "finite_difference":
        _check_step(parameters, step)
    samples: list[list[float]] = []
    for _ in range(probes):
        probe = [_gaussian(tensor, generator) for tensor in tensors]
        if product == "exact":
            samples.append(_exact(batches, tensors, probe))
        else:
            samples.append(_finite_difference(batches, tensors, probe, step))
    return {
        name: TraceEstimate(statistics.fmean(column), statistics.stdev(column) / probes**0.5, list(column))
        for name, column in zip(parameters, zip(*samples, strict=True), strict=True)
    }


def _check_step(parameters: Mapping[str, Tensor], step: float) -> None:
    narrow = [name for name, p in parameters.items() if torch.finfo(p.dtype).bits < 32]
    if narrow or not step > 0:
        raise ParameterError(
            f"a finite difference of step {step} over {len(narrow)} 16-bit parameters was asked for",
            "It needs a step above 0 and float32 or float64 parameters",
            "Raise the step, load the model in float32, or use product exact",
        )


def _gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn where the generator lives: one seed gives the same probes whatever device the model is on.
    drawn = torch.randn(like.shape, generator=generator, device=generator.device)
    return drawn.to(like.device, like.dtype)


def _evaluate(loss: Loss, batch: int) -> Tensor:
    value = loss()
    if not torch.isfinite(value):
        raise NonFiniteLoss(
            f"the Hessian trace of batch {batch}'s loss was asked for",
            f"That loss is {value.item()}, and only finite losses have one",
            "Load the model in float32, or look for an empty or broken batch",
        )
    return value


def _dots(probe: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[float]:
    """v_i^T g_i in float64: finite differences subtract nearly equal numbers of this kind."""
    return [float(torch.dot(v.flatten().double(), g.flatten().double())) for v, g in zip(probe, vectors, strict=True)]


def _exact(losses: Sequence[Loss], tensors: Sequence[Tensor], probe: Sequence[Tensor]) -> list[float]:
    sums = [0.0] * len(tensors)
    for batch, loss in enumerate(losses):
        gradients = torch.autograd.grad(_evaluate(loss, batch), tensors, create_graph=True)
        # A gradient without a graph is constant: the loss is linear in that parameter.
        curved = [(g, v) for g, v in zip(gradients, probe, strict=True) if g.requires_grad]
        if curved:
            products = torch.autograd.grad(
                [g for g, _ in curved], tensors, [v for _, v in curved], materialize_grads=True
            )
            sums = [s + d for s, d in zip(sums, _dots(probe, products), strict=True)]
    return [s / len(losses) for s in sums]


def _finite_difference(
    losses: Sequence[Loss], tensors: Sequence[Tensor], probe: Sequence[Tensor], step: float
) -> list[float]:
    saved = [tensor.detach().clone() for tensor in tensors]
    squares = sum(float(s.double().square().sum()) for s in saved)
    rms = (squares / sum(s.numel() for s in saved)) ** 0.5
    # One eps for all parameters: with one each, H v would no longer be the exact product's.
    eps = step * (rms or 1.0)
    sums = [0.0] * len(tensors)
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for tensor, original, v in zip(tensors, saved, probe, strict=True):
                    tensor.copy_(original + sign * eps * v)
            for batch, loss in enumerate(losses):
                gradients = torch.autograd.grad(_evaluate(loss, batch), tensors)
                sums = [s + sign * d for s, d in zip(sums, _dots(probe, gradients), strict=True)]
    finally:
        with torch.no_grad():
            for tensor, original in zip(tensors, saved, strict=True):
                tensor.copy_(original)
    return [s / (2 * eps * len(losses)) for s in sums]
