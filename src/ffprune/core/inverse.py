"""The upper Cholesky factor of H^-1, which removes weights column by column (SparseGPT, GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.gram import damped


@dataclass(frozen=True)
class InverseFactor:
    """H^-1 = U^T U, H = X^T X + lambda I with dead inputs revived.

    Attributes:
        upper: float64 ``[n, n]``, U, upper triangular. ``upper[j:, j:]`` is the factor of the inverse of
            ``H[j:, j:]``, so ``upper[j, j]^2`` is [H^-1]_jj when only the inputs from j on are left.
        dead: bool ``[n]``, inputs that were always 0. H_jj = 1 there, as in SparseGPT's code, and their weights are
            to be zeroed: nothing that the layer computes changes.
        damping: lambda / mean diag(H) that was used: the one asked for, unless that one failed.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(xx: Tensor, damping: float, most: float = 1.0) -> InverseFactor:
    """Factorise, in float64; where that fails, with damping raised tenfold, again and again.

    Args:
        xx: float ``[n, n]``, X^T X (:attr:`ffprune.core.gram.Gram.xx`).
        damping: lambda relative to mean diag(H), dead inputs counted as 1.
        most: the damping is not raised beyond this; ``most=damping`` never raises it.

    Raises:
        ParameterError: negative damping, or H cannot be factorised with any damping allowed.
    """
    h = xx.to(torch.float64, copy=True)
    dead = h.diagonal() == 0
    h.diagonal().masked_fill_(dead, 1)
    used, lower = damping, _reverse_cholesky(h, damping)
    while lower is None:
        if not 0 < 10 * used <= most:
            raise ParameterError(
                f"damping {damping} was asked for",
                f"The Gram of {len(h)} inputs has no Cholesky factor with any damping up to {used:g}",
                "Calibrate on more tokens, check that the activations are finite, or raise the damping",
            )
        used *= 10
        lower = _reverse_cholesky(h, used)
    identity = torch.eye(len(h), dtype=torch.float64, device=h.device)
    return InverseFactor(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), dead, used)


def _reverse_cholesky(h: Tensor, damping: float) -> Tensor | None:
    """Lower L with H = R R^T, R = L flipped in both directions, thus upper; None if there is no such factor.

    The upper factor of H^-1 is then R^-1: one factorisation and one solve, where inverting H first takes two.
    """
    lower, failed = torch.linalg.cholesky_ex(damped(h, damping).flip(0, 1))
    # Infinities on the diagonal pass for success.
    return lower if not failed and lower.diagonal().isfinite().all() else None
