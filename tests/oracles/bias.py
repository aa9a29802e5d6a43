"""Twins of ffprune.core.bias: numpy's least squares with a column of ones, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def affine(weight: Floats, x: Floats, kept: list[int], strength: float) -> tuple[Floats, Floats]:
    """Regress what the removed columns add on the kept columns and an intercept, which alone is not shrunk.

    Args:
        weight: ``[d_out, n]``.
        x: ``[tokens, n]``, the dense input.
        kept: columns that stay.
        strength: lambda, absolute, as augmented rows.

    Returns:
        ``[d_out, k]``, the kept columns' map, and ``[d_out]``, the intercept.
    """
    removed = [j for j in range(weight.shape[1]) if j not in kept]
    ones, zeros = np.ones((len(x), 1)), np.zeros((len(kept), 1))
    rows = np.block([[x[:, kept], ones], [strength**0.5 * np.eye(len(kept)), zeros]])
    target = np.concatenate([x[:, removed] @ weight[:, removed].T, np.zeros((len(kept), len(weight)))])
    solution = np.linalg.lstsq(rows, target)[0]
    return weight[:, kept] + solution[:-1].T, solution[-1]
