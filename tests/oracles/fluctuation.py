"""Twin of ffprune.core.fluctuation: a loop over columns and tokens."""

from __future__ import annotations

from torch import Tensor


def wifv(weight: Tensor, tokens: Tensor) -> list[float]:
    """||W_:,j||^2 * sum (x_j - mean_j)^2 for every column of ``[tokens, n]``."""
    scores = []
    for j in range(weight.shape[1]):
        column = [float(x) for x in tokens[:, j]]
        mean = sum(column) / len(column)
        scores.append(sum(float(w) ** 2 for w in weight[:, j]) * sum((x - mean) ** 2 for x in column))
    return scores
