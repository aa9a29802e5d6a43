"""Weight quantisation on the Gram, after pruning: GPTQ (Frantar et al. 2022; MS section 3.2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.inverse import inverse_factor


@dataclass(frozen=True)
class Quantised:
    """A weight on its grids: every entry is (code - zero) * scale, with a whole code in [0, 2^bits - 1].

    Attributes:
        weight: ``[d_out, n]``, de-quantised, in the dtype of the weight that was given.
        scale: float32 ``[d_out, groups]``, distance between two grid points of a row's group; above 0.
        zero: int64 ``[d_out, groups]``, the code that means 0.
        bits: bits of a code.
        damping: the damping that was used; more than was asked if the Gram had no Cholesky factor with that.
        error: squared error of the map's output against the weight that was given, summed over the calibration
            tokens and outputs.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    damping: float
    error: float


def quantise(
    weight: Tensor,
    xx: Tensor,
    bits: int,
    group_size: int | None,
    mask: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> Quantised:
    """Round column after column, each rounding error made up for by the columns that are still to come.

    With U the upper Cholesky factor of H^-1, H = X^T X + lambda I, rounding column j by e = (w_j - q_j) / U_jj
    moves the later columns by -e U_j,: (Frantar et al. 2022, Alg. 1). Grids are asymmetric, per row and group,
    from the least and the greatest weight; they are taken when the group starts, from the weights as the errors
    before have moved them. 0 is always a grid point.

    A pruned weight is a column whose only grid point is 0: what the errors before would have made of it is one more
    error, which goes to the columns after it, as where SparseGPT prunes and quantises in one pass (Frantar and
    Alistarh 2023). It neither comes back nor widens a grid.

    Args:
        weight: float ``[d_out, n]``; not changed.
        xx: float ``[n, n]``, Gram of its input, X^T X. All zeros (an input that is never there): rounded to nearest.
        bits: 2 to 8.
        group_size: columns that share a grid, fewer in the last group where it does not divide n; None or -1: the
            whole row.
        mask: bool ``[d_out, n]``, True: kept; those that are not end as 0. None: all kept, zeros as well.
        damping: lambda relative to mean diag(xx); raised tenfold, up to 1, where there is no Cholesky factor.
        block: columns between two updates of all later ones; it changes the speed, not the result.

    Returns:
        The quantised weight; computed in float64.

    Raises:
        ParameterError: bits or group size are impossible, damping is negative, or ``xx`` is no Gram at all
            (not finite, or far from positive semi-definite).
        ValueError: weight and mask differ in shape.
    """
    n = weight.shape[1]
    width = _group_width(bits, group_size, n)
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"the mask is of shape {tuple(mask.shape)}, the weight of shape {tuple(weight.shape)}")
    wide, gram = weight.detach().double(), xx.double()
    found = inverse_factor(gram, damping)
    factor = found.upper
    # Columns are worked on as rows, for these are contiguous.
    left = wide.T.clone(memory_format=torch.contiguous_format)
    kept = torch.ones_like(left, dtype=torch.bool) if mask is None else mask.T.contiguous()
    rounded, scales, zeros = torch.empty_like(left), [], []
    for start in range(0, n, width):
        stop = min(start + width, n)
        scale, zero = _grid(left[start:stop] * kept[start:stop], bits)
        for begin in range(start, stop, block):
            end = min(begin + block, stop)
            errors = torch.empty_like(left[begin:end])
            for j, error in zip(range(begin, end), errors, strict=True):
                code = torch.clamp(torch.round(left[j] / scale) + zero, 0, 2**bits - 1)
                rounded[j] = torch.where(kept[j], (code - zero) * scale, 0.0)
                torch.div(left[j] - rounded[j], factor[j, j], out=error)
                left[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    answer = rounded.T.to(weight.dtype, memory_format=torch.contiguous_format)
    lost = wide - answer.double()
    return Quantised(
        weight=answer,
        scale=torch.stack(scales, 1).float(),
        zero=torch.stack(zeros, 1).long(),
        bits=bits,
        damping=found.damping,
        error=float(((lost @ gram) * lost).sum()),
    )


def _group_width(bits: int, group_size: int | None, n: int) -> int:
    """Columns of a group, after all refusals that concern bits and groups."""
    if bits not in range(2, 9):
        raise ParameterError(f"quantize.bits {bits} was asked for", "Possible are 2 to 8 bits", "Change quantize.bits")
    if group_size is None or group_size == -1:
        return n
    if group_size < 1:
        raise ParameterError(
            f"quantize.group_size {group_size} was asked for",
            "A group has 1 column or more; null is the whole row",
            "Change quantize.group_size",
        )
    return min(group_size, n)


def _grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, both float64 ``[d_out]``, of asymmetric grids over ``[columns, d_out]`` that contain 0."""
    low, high = weights.amin(0).clamp_max(0), weights.amax(0).clamp_min(0)
    # Rounded before it is used, so that the float32 scale that is stored gives exactly these weights.
    scale = ((high - low) / (2**bits - 1)).float().double()
    # Nothing but zeros: any scale will do.
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round(-low / scale)


def bits_per_weight(bits: int, group_size: int) -> float:
    """Storage of one weight with its share of the grid: a scale of 16 bits and a zero of ``bits`` per group.

    Args:
        bits: bits of a code.
        group_size: columns that share a grid; for whole rows, the width of the row.
    """
    return bits + (16 + bits) / group_size


def compression_ratio(bits: float, sparsity: float) -> float:
    """The theoretical "Ratio" of MS Table 4 against 16 bits and no pruning: 16 / bits / (1 - sparsity).

    It counts neither the grids nor where the kept weights are: 4 bits 4.0, 3 bits 5.3, 50% and 4 bits 8.0.

    Args:
        bits: bits of a kept weight; 16 if it is not quantised.
        sparsity: removed / prunable, in [0, 1).
    """
    return 16 / bits / (1 - sparsity)
