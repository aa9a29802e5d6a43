"""Statistics of a whole forward pass, in which no layer waits for another."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ffprune.core.gram import Gram
from ffprune.models.view import ModelView
from ffprune.models.watch import watch


def collect(view: ModelView, windows: Tensor, full: Collection[str], batch_size: int) -> dict[str, Gram]:
    """Name -> Gram of every prunable linear's input; whole for the names in ``full``."""
    decoder = view.model.get_decoder()
    with torch.inference_mode(), watch(view, range(len(view.blocks)), full) as grams:
        for batch in windows.split(batch_size):
            decoder(input_ids=batch, use_cache=False)
    return {name: grams[name] for name in view.prunable}
