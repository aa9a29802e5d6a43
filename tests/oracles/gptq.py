"""Twin of ffprune.core.gptq: one weight at a time, the inverse of what is left taken again at every column; float64."""

from __future__ import annotations

import torch
from torch import Tensor


def grid(values: Tensor, bits: int) -> list[float]:
    """The points of an asymmetric min-max grid over one row's group, 0 among them, in ascending order."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    # The one thing that is not float64: a scale is stored in float32.
    scale = float(torch.tensor((high - low) / (2**bits - 1), dtype=torch.float64).float()) or 1.0
    below = round(-low / scale)
    return [scale * (code - below) for code in range(2**bits)]


def quantise(weight: Tensor, h: Tensor, bits: int, width: int, kept: Tensor) -> Tensor:
    """GPTQ as optimal brain surgery without any factor: H^-1 of the columns that are left, at every column.

    Args:
        weight: ``[d_out, n]``.
        h: ``[n, n]``, damped already.
        bits: bits of a code.
        width: columns of a group.
        kept: bool ``[d_out, n]``; a weight that is not kept can only be rounded to 0.

    Returns:
        float64 ``[d_out, n]``.
    """
    rounded = weight.double().clone()
    for j in range(weight.shape[1]):
        if j % width == 0:
            current = torch.where(kept, rounded, 0.0)[:, j : j + width]
            points = [grid(row, bits) for row in current]
        inverse = torch.linalg.inv(h.double()[j:, j:])
        for row, keep, allowed in zip(rounded, kept[:, j], points, strict=True):
            before = float(row[j])
            row[j] = min(allowed, key=lambda point: abs(point - before)) if keep else 0.0
            row[j + 1 :] -= (before - row[j]) / inverse[0, 0] * inverse[0, 1:]
    return rounded


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """||X (W - Q)^T||^2."""
    return float((x.double() @ (weight.double() - rounded.double()).T).square().sum())
