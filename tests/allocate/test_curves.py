from __future__ import annotations

import numpy as np
import pytest
import torch

from ffprune.allocate.curves import loss_curve


def test_the_curve_is_the_second_order_loss_of_the_error() -> None:
    # Errors e of every token, curvature C = c I: the mean of e^T C e / 2 is the curve's value.
    draw = torch.Generator().manual_seed(0)
    tokens, d_out, c = 30, 5, 0.7
    e = torch.randn(tokens, d_out, generator=draw, dtype=torch.float64)
    expected = float((e.square().sum(1) * c / 2).mean())
    error = np.array([float(e.square().sum()), 0.0])
    found = loss_curve(error, c * d_out, tokens, d_out)
    assert found[0] == pytest.approx(expected)
    assert found[1] == 0
    assert found.shape == error.shape
