"""How much of a layer stands out: OWL's layerwise outlier distribution (Yin et al. 2023; METHODS 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def outlier_share(scores: Sequence[Tensor], multiple: float = 5.0) -> float:
    """Share of a layer's weights whose score is above ``multiple`` times the layer's mean score.

    The published code gives it in percent; :func:`ffprune.allocate.owl.owl` reads only how layers compare.

    Args:
        scores: the layer's score matrices (Wanda, |W_ij| * ||X_j||_2), float, any shapes, taken as one pool. They are
            read twice, one at a time, and never joined.
        multiple: M of the paper.

    Returns:
        A share in [0, 1]; a score of exactly M * mean does not count.

    Raises:
        ValueError: there are no scores.
    """
    count = sum(matrix.numel() for matrix in scores)
    if count == 0:
        raise ValueError("a layer without scores has no share of outliers")
    mean = sum(float(matrix.sum(dtype=torch.float64)) for matrix in scores) / count
    return sum(int((matrix > multiple * mean).sum()) for matrix in scores) / count
