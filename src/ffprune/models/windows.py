"""A text as non-overlapping windows of tokens (METHODS 8)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffprune.core.errors import ParameterError, TooLittleText


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seqlen: int,
    count: int | None = None,
    offset: int = 0,
) -> Tensor:
    """Cut a text, tokenised once as one string, into windows that do not overlap.

    No special token is added unless the tokenizer adds it by itself (a BOS, where there is one, opens the
    text, not every window). Tokens after the last whole window are left out.

    Args:
        tokenizer: the model's tokenizer.
        text: the whole text.
        seqlen: tokens in a window, at least 2 (a window scores ``seqlen - 1`` tokens).
        count: number of windows; None or 0 means all there are.
        offset: windows skipped at the start of the text.

    Returns:
        [count, seqlen] int64 token ids on the CPU.

    Raises:
        ParameterError: seqlen below 2, or a negative count or offset.
        TooLittleText: the text has fewer windows than asked, or none at all.
    """
    if seqlen < 2 or (count or 0) < 0 or offset < 0:
        raise ParameterError(
            f"Asked for {count} windows of {seqlen} tokens after the first {offset}",
            "A window has at least 2 tokens; counts and offsets are not negative",
            "Raise seqlen, count or offset",
        )
    # verbose=False: the text is longer than the model's context by design.
    encoded = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.long)
    whole = tokens.numel() // seqlen
    wanted = count or max(whole - offset, 1)
    if offset + wanted > whole:
        after = f" after the first {offset}" if offset else ""
        raise TooLittleText(
            f"Asked for {wanted} windows of {seqlen} tokens{after}, {(offset + wanted) * seqlen:,} tokens",
            f"The text has {tokens.numel():,} tokens, at most {max(whole - offset, 0)} windows{after}",
            "Lower the number of windows or their length, or give more text",
        )
    return tokens[offset * seqlen : (offset + wanted) * seqlen].view(wanted, seqlen)
