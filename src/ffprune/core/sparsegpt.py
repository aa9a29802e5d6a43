"""Mask and reconstruction in one sweep over the columns (SparseGPT, Frantar and Alistarh 2023; MS Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.inverse import inverse_factor
from ffprune.core.masks import keep_mask, parse_pattern, pattern_mask
from ffprune.core.saliency import SALIENCIES
from ffprune.core.tables import look_up


@dataclass(frozen=True)
class Reconstruction:
    """A matrix with weights removed and the others changed to make up for them.

    Attributes:
        weight: ``[out, in]``, in the dtype it came in; exactly 0 where the mask is False.
        mask: bool ``[out, in]``, True stays.
        damping: lambda / mean diag(H) that was used; more than was asked for if that one failed.
        error: tr(D H D^T), D the change of the weight and H = X^T X + lambda I: the squared error of the output, summed
            over the calibration tokens and outputs, plus lambda ||D||^2. Dead inputs add nothing.
    """

    weight: Tensor
    mask: Tensor
    damping: float
    error: float


def reconstruct(
    weight: Tensor,
    xx: Tensor,
    kept: int,
    saliency: str = "obs",
    pattern: str | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Reconstruction:
    """Remove weights column by column, each time repairing the columns further right.

    With U the upper Cholesky factor of H^-1, removing w in column m takes w / U_mm * U_m,: from its row: MS Eq. 3 on
    the columns from m on. Inside a block of columns that is done at once; what is right of the block gets the sum of
    all changes, one matrix product.

    The mask is chosen where the sweep has arrived, from the weights as repaired so far: per block, over all rows
    together, or per M columns for an N:M pattern. Criteria are those of :data:`~ffprune.core.saliency.SALIENCIES` with
    [H^-1]_mm = U_mm^2, the inverse over the columns still to come (as SparseGPT's code has it), and H_mm without
    damping. As rows compare here, ``wanda`` and ``obd`` choose alike.

    Blocks share ``kept`` by their widths, so that the whole matrix keeps exactly that many; the published threshold
    removes one more per block, and ties.

    Args:
        weight: float ``[out, in]``; computed in float32, or float64 if it is.
        xx: float ``[in, in]``, X^T X of the matrix's input; factorised in float64.
        kept: weights that stay, 0 to out * in; with a pattern, the count that the pattern gives.
        saliency: the criterion's name.
        pattern: "N:M", N kept of M neighbouring inputs, or None.
        block: columns of one block; with a pattern, a multiple of M.
        damping: lambda relative to mean diag(H), raised tenfold up to 1 if H cannot be factorised.

    Raises:
        ParameterError: the criterion is unknown; the pattern is malformed, does not divide the width or the block,
            or keeps another number than ``kept``; H cannot be factorised.
        ValueError: ``kept`` is out of range, ``xx`` is of another width, or a weight is NaN.
    """
    score = look_up(SALIENCIES, saliency, "criterion").score
    outputs, width = weight.shape
    if xx.shape != (width, width):
        raise ValueError(f"the weight has {width} inputs, the Gram is of shape {tuple(xx.shape)}")
    group = 0 if pattern is None else _group(pattern, outputs, width, kept, block)
    factor = inverse_factor(xx, damping)
    diag, inverse = xx.diagonal().double(), factor.upper.diagonal().square()
    # Columns are worked on one by one, so they are laid out as rows: in memory, neighbours.
    columns = weight.detach().T.contiguous().to(torch.promote_types(weight.dtype, torch.float32))
    work = columns.masked_fill(factor.dead[:, None], 0)
    upper = factor.upper.to(work.dtype)
    keep = torch.empty_like(work, dtype=torch.bool)
    error = 0.0
    for start in range(0, width, block):
        end = min(start + block, width)
        if pattern is None:
            share = kept * end // width - kept * start // width
            block_scores = score(work[start:end].T, diag[start:end], inverse[start:end])
            keep[start:end] = keep_mask(block_scores, share, "matrix").T
        changes = torch.empty_like(work[start:end])
        for m in range(start, end):
            if pattern is not None and m % group == 0:
                now = slice(m, m + group)
                keep[now] = pattern_mask(score(work[now].T, diag[now], inverse[now]), pattern).T
            changes[m - start] = work[m].masked_fill(keep[m], 0) / upper[m, m]
            work[m + 1 : end].addr_(upper[m, m + 1 : end], changes[m - start], alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, changes, alpha=-1)
        error += float(changes.square().sum(dtype=torch.float64))
    repaired = work.masked_fill_(~keep, 0).T.to(weight.dtype).contiguous()
    return Reconstruction(repaired, keep.T.contiguous(), factor.damping, error)


def _group(pattern: str, outputs: int, width: int, kept: int, block: int) -> int:
    """M of a pattern that fits the matrix, the block and the count."""
    stay, group = parse_pattern(pattern, width)
    if block % group:
        raise ParameterError(
            f"pattern {pattern} was asked for in blocks of {block} columns",
            f"Groups of {group} inputs must not be cut by a block",
            f"Take a block that is a multiple of {group}",
        )
    possible = outputs * width // group * stay
    if kept != possible:
        raise ParameterError(
            f"pattern {pattern} was asked for with {kept} of {outputs * width} weights kept",
            f"The pattern keeps exactly {possible}",
            f"Set sparsity to {1 - stay / group:g}, or pattern to null",
        )
    return group
