"""Calibration text and how a model is run on it: what a dense model's linears get, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.gram import Gram
from ffprune.models.blocks import BlockWalk
from ffprune.models.view import ModelView


@dataclass(frozen=True)
class Calibration:
    """Calibration text, and how a model is run on it.

    Attributes:
        windows: int64 ``[n, seqlen]``.
        batch_size: windows a forward pass.
        dtype: that layers multiply in.
        progress: told of layers done and in all.
    """

    windows: Tensor
    batch_size: int
    dtype: torch.dtype = torch.float32
    progress: Callable[[int, int], None] | None = None

    def grams(self, view: ModelView, full: Collection[str] | None = None) -> Iterator[dict[str, Gram]]:
        """Statistics of the dense model, one layer at a time.

        A layer is run when its turn comes, and may be changed behind it: only one layer's X^T X, and the hidden states
        of all windows, are held at any time.

        Args:
            view: the dense model's view.
            full: roles whose whole X^T X is wanted; None: all.

        Yields:
            Role -> Gram, layer by layer; empty again when the next layer is asked for.

        Raises:
            ParameterError: there are no windows.
            NonFiniteLoss: statistics are not finite.
        """
        walk = BlockWalk(view, self.windows, self.batch_size, self.dtype)
        for block in view.blocks:
            grams, outputs = walk.observe(tuple(block.linears) if full is None else full)
            yield grams
            grams.clear()  # a loop would hold them while the next layer's are made
            walk.advance(outputs)
            if self.progress is not None:
                self.progress(block.index + 1, len(view.blocks))
