"""OWL: layers with more outliers keep more (Yin et al. 2023, METHODS 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.budget import Bounds
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit


def owl(
    units: Sequence[Unit],
    outliers: NDArray[np.float64],
    sparsity: float,
    half_width: float,
    bounds: Bounds,
) -> Allocation:
    """Retention grows linearly with the share of outliers, over a span of 2 lambda, its mean 1 - s.

    As in the published code the plain mean over units is 1 - s, so that one layer far above the rest may leave
    [1 - s - lambda, 1 - s + lambda]. Units differ in size: a common shift then meets the exact budget by parameters.

    Args:
        units: N prunable units, structured or weight matrices.
        outliers: float64 ``[N]``, :func:`ffprune.core.outliers.outlier_share` of the layer each unit belongs to (the
            paper's layerwise ratios: equal within a layer), or of the unit itself.
        sparsity: s, removed / all cost.
        half_width: lambda, 0.08 in the paper; half the span of the retentions.
        bounds: retention bounds.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
        ValueError: not one share per unit, or shares that are not numbers.
    """
    span = float(np.ptp(outliers))
    # Layers that do not differ have no order to map: all get 1 - s.
    offsets = (outliers - outliers.mean()) * (2 * half_width / span if span > 0 else 0.0)
    return to_allocation(1 - sparsity + offsets, outliers, units, sparsity, bounds)
