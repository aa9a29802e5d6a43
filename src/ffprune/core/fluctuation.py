"""FLAP's weighted input fluctuation (WIFV; An et al. 2024): what a column's departure from its mean is worth."""

from __future__ import annotations

from torch import Tensor

from ffprune.core.gram import Gram


def wifv(weight: Tensor, gram: Gram, squared: bool = False) -> Tensor:
    """||W_:,j||^2 * sum over tokens of (x_j - mean_j)^2 for every input column j (METHODS 5).

    Args:
        weight: float ``[d_out, n]``, a unit's last linear map.
        gram: of its input; the diagonal and the totals are enough.
        squared: square the score once more, as the published code does with the columns of o_proj and not with those
            of down_proj. METHODS 5 does not. It changes how heads compare with channels in
            :func:`ffprune.allocate.flap.global_threshold`, and which heads go.

    Returns:
        float64 ``[n]``.

    Raises:
        ValueError: the Gram has seen no tokens.
    """
    scores = weight.double().square().sum(0) * gram.variance * gram.count
    return scores.square() if squared else scores
