"""Logits a few rows at a time: they never cost more memory than a slice of the LM head's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError, UnsupportedArchitecture

Reduce = Callable[[Tensor, Tensor, int], Tensor | tuple[Tensor, ...]]
"""(logits [rows, vocabulary] in the model's dtype, labels [rows], first row of these) -> [rows] float32, or several."""

_KNOWN: WeakSet[nn.Module] = WeakSet()  # models whose logits were checked

#: What families do to the LM head's output: setting of the config -> (logits, its value) -> logits.
_LAST_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
}


def reduce_logits(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    reduce: Reduce,
    progress: Callable[[int, int], None] | None = None,
    head_rows: int = 512,
) -> list[Tensor]:
    """Run a model over windows and reduce its logits, at most ``head_rows`` rows of which exist at a time.

    The decoder and the LM head run in the model's own dtype.

    Args:
        model: a causal language model; put into eval mode while it runs, then back.
        windows: [n_windows, seqlen] int64 token ids.
        batch_size: windows per forward pass.
        reduce: called with the rows in the order of windows and positions, ``seqlen - 1`` a window.
        progress: called after each batch with windows done and windows in total.
        head_rows: positions per application of the LM head.

    Returns:
        What ``reduce`` gives, each as [n_windows, seqlen - 1] float32 on the CPU.

    Raises:
        ParameterError: windows of a wrong shape, batch_size or head_rows below 1.
        UnsupportedArchitecture: the logits are not the head of the decoder's output, scaled or soft-capped.
    """
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2 or batch_size < 1 or head_rows < 1:
        raise ParameterError(
            f"Asked for the loss on windows of shape {tuple(windows.shape)}, {batch_size} at a time, "
            f"with {head_rows} rows of logits at a time",
            "Windows are [at least 1, at least 2] token ids; batch_size and head_rows are at least 1",
            "Give more windows or longer ones, or raise batch_size or head_rows",
        )
    training = model.training
    model.train(False)
    done = 0
    pieces: list[tuple[Tensor, ...]] = []
    try:
        assert_head_is_known(model)
        decoder, head = _ends(model)
        assert head is not None  # checked above
        with torch.inference_mode():
            for start in range(0, len(windows), batch_size):
                batch = windows[start : start + batch_size].to(model.device)
                hidden = decoder(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
                rows = hidden.reshape(-1, hidden.shape[-1])
                labels = batch[:, 1:].reshape(-1)
                for i in range(0, len(rows), head_rows):
                    reduced = reduce(_finish(model, head(rows[i : i + head_rows])), labels[i : i + head_rows], done + i)
                    pieces.append(reduced if isinstance(reduced, tuple) else (reduced,))
                done += len(rows)
                if progress is not None:
                    progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        model.train(training)
    # Copies: no inference tensors, so that callers may differentiate around them.
    return [torch.cat(column).cpu().view(len(windows), -1).clone() for column in zip(*pieces, strict=True)]


def last_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits behind the last token of every sequence, of a forward pass that fills a KV cache.

    The model's own forward pass applies the head to a strided row, and for that torch 2.13 copies the whole head: a
    tenth of the default model's prefill of 512 tokens on a CPU.

    Args:
        model: a causal language model in eval mode.
        tokens: int64 ``[batch, length]``, on its device.

    Returns:
        ``[batch, vocabulary]``, in the model's dtype.
    """
    decoder, head = _ends(model)
    assert head is not None  # of a causal language model
    hidden = decoder(input_ids=tokens, use_cache=True).last_hidden_state[:, -1]
    return _finish(model, head(hidden.contiguous()))


def assert_head_is_known(model: PreTrainedModel) -> None:
    """Check once per model that its logits are ``head(decoder(x))``, scaled or soft-capped as its config says.

    Both are compared on 8 tokens: another last step would otherwise be lost without a sign. OPT-350M's ``project_out``
    is inside the decoder and passes.

    Args:
        model: a causal language model in eval mode.

    Raises:
        UnsupportedArchitecture: the two differ.
    """
    if model in _KNOWN:
        return
    decoder, head = _ends(model)
    known = False
    if head is not None and decoder is not model:
        vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        tokens = (torch.arange(8, device=model.device) * 97 % vocabulary)[None]
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits
            ours = _finish(model, head(decoder(input_ids=tokens, use_cache=False).last_hidden_state))
        # The same kernels on the same numbers: two units in the last place are more than enough.
        scale = float(logits.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        slack = 2 * torch.finfo(logits.dtype).eps * scale
        known = torch.allclose(ours.float(), logits.float(), rtol=0.0, atol=slack, equal_nan=True)
    if not known:
        raise UnsupportedArchitecture(
            f"The logits of {type(model).__name__} are not its LM head applied to its decoder's output",
            f"Perplexity applies the head to a few rows at a time, then what {' and '.join(_LAST_STEPS)} say",
            "Use a model of a supported family, or add this model's last step to ffprune/evaluate/logits.py",
        )
    _KNOWN.add(model)


def _finish(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """The head's output as the model's config wants it."""
    for setting, step in _LAST_STEPS.items():
        if (value := getattr(model.config, setting, None)) is not None:
            logits = step(logits, value)
    return logits


def _ends(model: Any) -> tuple[nn.Module, nn.Module | None]:
    """The decoder and the LM head (None where there is none)."""
    return model.get_decoder(), model.get_output_embeddings()
