"""Principal directions of a signal (SliceGPT, Ashkboos et al. 2024, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss
from ffprune.core.gram import damped

#: Tokens that are held in float64 at once.
_ROWS = 8192


def second_moment(signal: Tensor) -> Tensor:
    """X^T X without centring, in float64.

    Args:
        signal: ``[..., n]``, any float dtype; each row of n is a token.

    Returns:
        float64 ``[n, n]``, the sum of x x^T over tokens.
    """
    width = signal.shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64, device=signal.device)
    for rows in torch.split(signal.reshape(-1, width), _ROWS):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def principal_basis(moment: Tensor, damping: float = 0.01) -> Tensor:
    """Orthonormal directions of a signal, most variance first.

    Args:
        moment: ``[n, n]``, X^T X; computed in float64.
        damping: added to the diagonal, as a share of its mean: moves no direction, but keeps the solver well away from
            singular matrices. The published code's 0.01.

    Returns:
        float64 ``[n, n]``, Q; its columns are eigenvectors of X^T X, so that X Q[:, :k] keeps the most variance that k
        directions can.

    Raises:
        NonFiniteLoss: ``moment`` is not finite.
    """
    if not moment.isfinite().all():
        raise NonFiniteLoss(
            f"The second moment of a signal of width {len(moment)} is not finite",
            "A principal basis needs finite calibration signals",
            "Check the model's weights, or load it as float32 if it runs in float16",
        )
    directions: Tensor = torch.linalg.eigh(damped(moment.double(), damping)).eigenvectors
    return directions.flip(1)
