"""Linear maps of given weights."""

from __future__ import annotations

from torch import Tensor, nn


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Make a linear compute with other weights, in place; tensors are taken as they are, and need no gradients."""
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    linear.out_features, linear.in_features = weight.shape


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear of these weights, ``[out, in]``."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    set_linear(linear, weight, bias)
    return linear
