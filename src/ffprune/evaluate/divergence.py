"""Kullback-Leibler divergence from the dense model's predictions, token by token: a loss with little noise.

The loss on a token also depends on what the text happened to say; the divergence compares two distributions over
all words instead, and is never negative. The dense model's are computed once per window and kept in mapped files, so
that the operating system, not the search, decides how much of them is in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.evaluate.logits import reduce_logits
from ffprune.evaluate.perplexity import REDUCE_ROWS, row_nll


class Teacher:
    """The dense model's next-word distributions on windows of text, ``seqlen x vocabulary x 2`` bytes a window."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def learn(self, model: PreTrainedModel, number: int, window: Tensor) -> Tensor:
        """Keep the model's distributions on a window; call it while the model is dense.

        Args:
            model: the dense model.
            number: the window's name.
            window: int64 ``[seqlen]``.

        Returns:
            Its own negative log-likelihood, float32 ``[seqlen - 1]``, in nats per token.
        """
        vocabulary = model.config.get_text_config().vocab_size
        rows = len(window) - 1
        # Rounded to bfloat16 they are a slightly different teacher, but the same one for every policy.
        kept = _mapped(rows, vocabulary)

        def keep(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, ...]:
            entropies = []
            for start in range(0, len(logits), REDUCE_ROWS):
                rounded = logits[start : start + REDUCE_ROWS].float().softmax(1).to(torch.bfloat16)
                kept[first + start : first + start + len(rounded)] = rounded.cpu()
                shares = rounded.float() / rounded.float().sum(1, keepdim=True)
                entropies.append(torch.special.entr(shares).sum(1))
            return torch.cat(entropies), row_nll(logits, labels)

        entropy, nll = reduce_logits(model, window[None], 1, keep)
        self._known[number] = (kept, entropy[0])
        return nll[0]

    def compare(
        self, model: PreTrainedModel, numbers: list[int], windows: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """How far a model's distributions are from the dense model's, and its loss on the text.

        Args:
            model: the pruned model.
            numbers: the windows' names, learnt before.
            windows: int64 ``[n, seqlen]``, the same windows.
            batch_size: windows a forward pass.

        Returns:
            KL(dense || model) and negative log-likelihood, float32 ``[n, seqlen - 1]`` each, in nats per token.
        """
        scored = windows.shape[1] - 1

        def shares(first: int, count: int) -> Tensor:
            pieces = []
            while count:
                window, row = divmod(first, scored)
                piece = self._known[numbers[window]][0][row : row + count]
                pieces.append(piece.to(model.device).float())
                first, count = first + len(piece), count - len(piece)
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        def reduce(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, ...]:
            cross, own = [], []
            for start in range(0, len(logits), REDUCE_ROWS):
                exact = logits[start : start + REDUCE_ROWS].float()
                p = shares(first + start, len(exact))
                total = torch.logsumexp(exact, dim=1)
                cross.append(total - torch.linalg.vecdot(p, exact) / p.sum(1))
                own.append(total - exact.gather(1, labels[start : start + REDUCE_ROWS, None])[:, 0])
            return torch.cat(cross), torch.cat(own)

        cross, own = reduce_logits(model, windows, batch_size, reduce)
        return cross - torch.stack([self._known[number][1] for number in numbers]), own


def _mapped(rows: int, columns: int) -> Tensor:
    """bfloat16 ``[rows, columns]`` on disk. Its file has no name any more: nothing stays behind, not even by a kill."""
    with tempfile.TemporaryDirectory(prefix="ffprune-teacher-") as folder:
        path = str(Path(folder) / "probabilities")
        return torch.from_file(path, shared=True, size=rows * columns, dtype=torch.bfloat16).view(rows, columns)
