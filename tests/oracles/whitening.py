"""Twin of ffprune.core.whitening: the best low-rank map found from the outputs themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def best(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """argmin over W' of that rank of ||X (W - W')^T||: outputs projected to their first left singular directions.

    Args:
        weight: ``[out, in]``.
        x: ``[tokens, in]``.
        rank: of W'.
    """
    u = torch.linalg.svd(weight.double() @ x.double().T, full_matrices=False).U[:, :rank]
    return u @ u.T @ weight.double()


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """||X (W - W')^T||^2, token by token."""
    change = weight.double() - other.double()
    return sum(float((change @ token).square().sum()) for token in x.double())
