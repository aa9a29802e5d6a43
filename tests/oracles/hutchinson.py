"""Twin of ffprune.core.hutchinson: the whole Hessian, written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def hessian(loss: Callable[[Mapping[str, Tensor]], Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """``[total, total]`` Hessian over all parameters, flattened in their order."""
    shapes = {name: p.shape for name, p in parameters.items()}

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return loss({name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)})

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    result: Tensor = torch.autograd.functional.hessian(of_flat, flat)
    return result


def traces(loss: Callable[[Mapping[str, Tensor]], Tensor], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Trace of each parameter's diagonal block."""
    diagonal = hessian(loss, parameters).diagonal().split([p.numel() for p in parameters.values()])
    return {name: float(part.sum()) for name, part in zip(parameters, diagonal, strict=True)}
