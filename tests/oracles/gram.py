"""Twin of ffprune.core.gram: all tokens at once, in float64."""

from __future__ import annotations

from torch import Tensor


def moments(tokens: Tensor) -> dict[str, Tensor]:
    """X^T X, mean, second moment and population variance of ``[tokens, n]``."""
    x = tokens.double()
    return {
        "xx": x.T @ x,
        "mean": x.mean(0),
        "second_moment": x.square().mean(0),
        "variance": x.var(0, correction=0),
    }
