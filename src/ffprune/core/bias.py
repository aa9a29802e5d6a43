"""Bias compensation: pruned columns are replaced by their mean (An et al. 2024, FLAP), alone or with ridge repair."""

from __future__ import annotations

import torch
from torch import Tensor

from ffprune.core.gram import Gram
from ffprune.core.ridge import repair


def mean_replacement(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """W_P mean_P: the bias that gives back what the pruned columns P add to the output on average.

    Args:
        weight: float ``[d_out, n]``, the dense map.
        mean: float ``[n]``, mean of its dense input over calibration tokens.
        kept: int64 ``[k]``, the columns that stay.

    Returns:
        float ``[d_out]`` in the dtype of ``weight``, computed in float64; to be added to the bias that is there.
    """
    pruned = mean.double().index_fill(0, kept, 0.0)
    return (weight.double() @ pruned).to(weight.dtype)


def affine_repair(
    weight: Tensor, gram: Gram, kept: Tensor, damping: float, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Ridge repair of the departures from the mean, and the bias that makes the mean output exact ("mean+ridge").

    Least squares with an intercept, which ridge does not shrink: with C = G - count * mean mean^T in place of G in
    METHODS 7, W_R' = W_R + W_P C_PR (C_RR + lambda I)^-1, and b = W_P mean_P + (W_R - W_R') mean_R.

    Args:
        weight: float ``[d_out, n]``, the dense map.
        gram: full Gram of its dense input.
        kept: int64 ``[k]``, the columns that stay (R), in the order they are wanted.
        damping: lambda; relative to mean diag(C), or absolute.
        absolute: how ``damping`` is read.

    Returns:
        the kept columns' map, float ``[d_out, k]``, and the bias to add, float ``[d_out]``, both in the dtype of
        ``weight``, computed in float64.

    Raises:
        ValueError: the Gram keeps its diagonal only, or has seen no tokens.
        ParameterError: negative damping.
    """
    if gram.xx is None:
        raise ValueError("affine repair reads a full Gram, and this one keeps its diagonal only")
    wide, mean = weight.double(), gram.mean
    centred = gram.xx.double() - gram.count * torch.outer(mean, mean)
    repaired = repair(wide, centred, kept, damping, absolute)
    bias = mean_replacement(wide, mean, kept) + (wide[:, kept] - repaired) @ mean[kept]
    return repaired.to(weight.dtype), bias.to(weight.dtype)
