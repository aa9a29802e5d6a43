"""Twin of ffprune.allocate.besa: probabilities and masks weight by weight, as the paper defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def beta(logits: Sequence[float]) -> list[float]:
    """Softmax."""
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


def rate(logits: Sequence[float]) -> float:
    """alpha = sum beta_d p_d, p_d = d / D."""
    return sum(b * d / (len(logits) - 1) for d, b in enumerate(beta(logits)))


def stays(logits: Sequence[float], width: int) -> list[float]:
    """By rank, 1 - the sum of beta_d over the candidates that prune this weight."""
    found = []
    for rank in range(width):
        pruned = 0.0
        for d, b in enumerate(beta(logits)):
            kept = width - d / (len(logits) - 1) * width
            if rank >= kept - 1e-9:
                pruned += b
        found.append(1 - pruned)
    return found


def soft_loss(logits: Sequence[float], ranks: Sequence[Sequence[int]], slopes: Sequence[Sequence[float]]) -> float:
    """Sum of slope times probability to stay, over all weights: what the straight-through mask has the gradient of."""
    probability = stays(logits, len(ranks[0]))
    return sum(
        s * probability[r]
        for row, weights in zip(ranks, slopes, strict=True)
        for r, s in zip(row, weights, strict=True)
    )
