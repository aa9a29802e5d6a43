"""Softmax of logits in float32, a few rows at a time, in memory that is used again.

What torch.logsumexp or softmax allocates for every few rows, the allocator may give back to the system each time, and
then new pages cost more than the arithmetic: 512 rows of the default model's 49,152 words in bfloat16 took logsumexp
28 to 145 ms on two cores, from run to run, and take 14 this way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 16
"""At once: their two copies in float32 stay in the processor's cache."""


class RowSoftmax:
    """Turns logits into probabilities; one object serves all slices of an evaluation."""

    def __init__(self) -> None:
        self._memory: tuple[Tensor, Tensor] | None = None

    def blocks(self, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few rows after the other.

        Args:
            logits: ``[rows, vocabulary]``, any number format.

        Yields:
            Which rows; their logits and their probabilities, float32 ``[n, vocabulary]``, both overwritten by the next.
        """
        for start in range(0, len(logits), _ROWS):
            some = logits[start : start + _ROWS]
            exact, shares = (memory[: len(some)] for memory in self._for(logits))
            exact.copy_(some)
            torch.softmax(exact, 1, out=shares)
            yield slice(start, start + len(some)), exact, shares

    def _for(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.Size((_ROWS, logits.shape[1]))
        if self._memory is None or self._memory[0].shape != shape or self._memory[0].device != logits.device:
            first, second = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
            self._memory = first, second
        return self._memory


def row_nll(logits: Tensor, labels: Tensor, softmax: RowSoftmax) -> Tensor:
    """logsumexp(logits) - logits[label], ``[rows, vocabulary]`` and int64 ``[rows]`` -> float32 ``[rows]``."""
    losses = []
    for rows, exact, shares in softmax.blocks(logits):
        # A likely word's, whose share is no denormal number.
        total = exact.amax(1) - shares.amax(1).log()
        losses.append(total - exact.gather(1, labels[rows, None])[:, 0])
    return torch.cat(losses)
