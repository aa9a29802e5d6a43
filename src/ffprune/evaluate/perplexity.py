"""Perplexity over windows of tokens (METHODS 8), with the LM head applied a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.errors import NonFiniteLoss
from ffprune.evaluate.logits import reduce_logits
from ffprune.evaluate.shares import RowSoftmax, row_nll


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        value: exp(nll_mean); inf when the loss is not finite.
        nll_mean: mean negative log-likelihood per token, in nats; inf when not finite.
        stderr: standard error of ``nll_mean`` over windows, in nats (times ``value``: in perplexity); None
            for a single window or a loss that is not finite.
        windows: number of windows.
        seqlen: tokens in a window.
        tokens: scored tokens, ``windows * (seqlen - 1)``.
        finite: whether ``value`` is a finite number.
    """

    value: float
    nll_mean: float
    stderr: float | None
    windows: int
    seqlen: int
    tokens: int
    finite: bool


def token_nll(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    head_rows: int = 512,
) -> Tensor:
    """Negative log-likelihood of every token given those before it in its window.

    The decoder and the LM head run in the model's own dtype, the log-softmax in float32. At most
    ``head_rows`` rows of logits exist at a time.

    Args:
        model: a causal language model; put into eval mode while it runs, then back.
        windows: [n_windows, seqlen] int64 token ids.
        batch_size: windows per forward pass.
        progress: called after each batch with windows done and windows in total.
        head_rows: positions per application of the LM head.

    Returns:
        [n_windows, seqlen - 1] float32 on the CPU, in nats; values may be inf or nan.

    Raises:
        ParameterError: windows of a wrong shape, batch_size or head_rows below 1.
        UnsupportedArchitecture: the logits are not just the head of the decoder's output.
    """
    softmax = RowSoftmax()
    nll = reduce_logits(
        model, windows, batch_size, lambda logits, labels, _: row_nll(logits, labels, softmax), progress, head_rows
    )
    return nll[0]


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    head_rows: int = 512,
    require_finite: bool = False,
) -> Perplexity:
    """exp(mean token NLL) over windows (METHODS 8): windows independent, labels shifted inside a window.

    Args:
        model: a causal language model; put into eval mode while it runs, then back.
        windows: [n_windows, seqlen] int64 token ids.
        batch_size: windows per forward pass.
        progress: called after each batch with windows done and windows in total.
        head_rows: positions per application of the LM head.
        require_finite: refuse a loss that is not finite instead of reporting inf.

    Returns:
        The perplexity with its windows and tokens; ``finite`` False and ``value`` inf for a broken model.

    Raises:
        NonFiniteLoss: the loss is not finite and ``require_finite`` is set.
        ParameterError, UnsupportedArchitecture: see :func:`token_nll`.
    """
    result = summarise(token_nll(model, windows, batch_size, progress, head_rows))
    if require_finite and not result.finite:
        raise NonFiniteLoss(
            f"Perplexity over {result.windows} windows of {result.seqlen} tokens is not a finite number",
            "A working model has a finite loss on any text",
            "Check the model's weights for inf or nan, raise ridge.damping, lower the sparsity or use fp32",
        )
    return result


def summarise(nll: Tensor) -> Perplexity:
    """Perplexity from the losses that :func:`token_nll` gives.

    Args:
        nll: [n_windows, seqlen - 1], in nats.

    Returns:
        The perplexity; sums are taken in float64.
    """
    per_window = nll.double().mean(dim=1)
    windows, scored = nll.shape
    mean = float(per_window.mean())
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    finite = math.isfinite(value)
    return Perplexity(
        value=value if finite else math.inf,
        nll_mean=mean if math.isfinite(mean) else math.inf,
        stderr=float(per_window.std()) / math.sqrt(windows) if finite and windows > 1 else None,
        windows=windows,
        seqlen=scored + 1,
        tokens=windows * scored,
        finite=finite,
    )
