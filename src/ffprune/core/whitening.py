"""Truncation-aware whitening: the low-rank map that moves a linear's output least (SVD-LLM, Wang et al. 2024, 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss, ParameterError
from ffprune.core.gram import damped


@dataclass(frozen=True)
class Truncation:
    """A matrix as a product of two thinner ones.

    Attributes:
        left: ``[out, rank]``, U sqrt(Sigma), in the dtype of the weight.
        right: ``[rank, in]``, sqrt(Sigma) V^T S^-1, in the dtype of the weight.
        damping: what was added to the diagonal of X^T X, absolute; 0 where its Cholesky factorisation succeeds.
        error: ||(W - left right) S||^2, the squares of the singular values that went: the squared error of the output
            summed over the calibration tokens, plus damping * ||W - left right||^2.
    """

    left: Tensor
    right: Tensor
    damping: float
    error: float


def truncate(weight: Tensor, xx: Tensor, rank: int) -> Truncation:
    """The best map of that rank for inputs X: SVD of W S, S S^T = X^T X, then S taken back.

    Since ||(W - W') X^T|| = ||(W - W') S||, singular values of W S are output errors, those of W are not. As in the
    published code, the singular values go to both factors in equal parts. Everything is computed in float64 (the
    published code takes the SVD in float32).

    Args:
        weight: float ``[out, in]``.
        xx: float ``[in, in]``, X^T X of the linear's input (:attr:`ffprune.core.gram.Gram.xx`).
        rank: 1 to min(out, in).

    Raises:
        ParameterError: a rank out of range.
        NonFiniteLoss: X^T X is not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ParameterError(
            f"A map of rank {rank} was asked for in place of one of shape {tuple(weight.shape)}",
            f"Its rank is 1 to {min(weight.shape)}",
            "Change the rank, or the sparsity that it comes from",
        )
    factor, damping = _cholesky(xx.double())
    u, sigma, vt = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    root = sigma[:rank].sqrt()
    right = torch.linalg.solve_triangular(factor, root[:, None] * vt[:rank], upper=False, left=False)
    return Truncation(
        (u[:, :rank] * root).to(weight.dtype),
        right.to(weight.dtype),
        damping,
        float(sigma[rank:].square().sum()),
    )


def _cholesky(gram: Tensor) -> tuple[Tensor, float]:
    """Lower S with S S^T = gram + damping I, and the damping.

    The published remedy lifts the smallest eigenvalue to 1e-6; where rounding eats that, ten times as much is added.
    """
    if not gram.isfinite().all():
        raise NonFiniteLoss(
            f"X^T X of {len(gram)} inputs is not finite",
            "Whitening needs finite statistics",
            "Check the model's weights, or load it as float32 if it runs in float16",
        )
    factor, failed = torch.linalg.cholesky_ex(gram)
    damping = 0.0
    while failed:
        damping = damping * 10 or abs(float(torch.linalg.eigvalsh(gram)[0])) + 1e-6
        factor, failed = torch.linalg.cholesky_ex(damped(gram, damping, absolute=True))
    return factor, damping
