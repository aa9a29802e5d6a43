"""Twin of ffprune.core.saliency: the formulas, one weight at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def score(name: str, w: float, h_mm: float, inverse_mm: float) -> float:
    return {
        "magnitude": abs(w),
        "wanda": abs(w) * math.sqrt(h_mm),
        "obd": w * w * h_mm,
        "obs": w * w / inverse_mm,
        "isc": w * w * (h_mm + 1 / inverse_mm),
    }[name]


def scores(name: str, weight: Tensor, xx: Tensor, h: Tensor) -> Tensor:
    """``xx`` is X^T X, ``h`` the matrix to invert."""
    inverse = torch.linalg.inv(h.double())
    return torch.tensor(
        [[score(name, w, float(xx[j, j]), float(inverse[j, j])) for j, w in enumerate(row)] for row in weight.tolist()],
        dtype=torch.float64,
    )
