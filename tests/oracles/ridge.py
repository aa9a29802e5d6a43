"""Twin of ffprune.core.ridge: least squares, and the objective's own minimum."""

from __future__ import annotations

import torch
from torch import Tensor


def lstsq(weight: Tensor, x: Tensor, kept: Tensor, strength: float) -> Tensor:
    """W_R + S, S the ridge regression of the removed columns' output on the kept columns, by augmented rows.

    Args:
        weight: ``[d_out, n]``.
        x: ``[tokens, n]``, the dense input.
        kept: ``[k]``.
        strength: lambda, absolute.
    """
    w, x = weight.double(), x.double()
    removed = [j for j in range(w.shape[1]) if j not in kept.tolist()]
    rows = torch.cat([x[:, kept], strength**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    target = torch.cat([x[:, removed] @ w[:, removed].T, torch.zeros(len(kept), len(w), dtype=torch.float64)])
    return w[:, kept] + torch.linalg.lstsq(rows, target).solution.T


def solve(weight: Tensor, h: Tensor, columns: list[int]) -> Tensor:
    """argmin over W' of tr((W - W' E) H (W - W' E)^T): W H E^T (E H E^T)^-1, with H damped already."""
    h = h.double()
    return torch.linalg.solve(h[columns][:, columns], (weight.double() @ h[:, columns]).T).T
