"""Loss curves per unit: what keeping k granules costs, predicted from second-order statistics.

The last linear map of a unit writes into the residual stream. There an output error e (one token) costs about
e^T C e / 2 nats, C the curvature of the loss in that output. With E the squared error that is left after the repair,
summed over calibration tokens and outputs, and C taken as (trace(C) / d_out) I, the unit costs about
E / (2 tokens) * trace(C) / d_out nats per token: the elimination says how much error is left, the curvature how much
an error there matters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def loss_curve(error: NDArray[np.float64], curvature: float, tokens: int, d_out: int) -> NDArray[np.float64]:
    """Predicted loss at every number of kept granules.

    Args:
        error: float64 ``[granules + 1]``, squared output error summed over tokens and outputs.
        curvature: trace(C), nats per squared unit of output, per token.
        tokens: calibration tokens behind ``error``.
        d_out: outputs of the unit's last linear map.

    Returns:
        float64 ``[granules + 1]``, nats per token.
    """
    return error / (2 * tokens) * (curvature / d_out)
