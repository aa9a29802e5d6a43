"""Twin of ffprune.core.importance: the whole ridge problem solved again for every candidate, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles import ridge


def objective(weight: Tensor, h: Tensor, columns: list[int]) -> float:
    """min over W' of tr((W - W' E) H (W - W' E)^T), E picking ``columns``: the error when only those are left."""
    difference = weight.double().clone()
    if columns:
        difference[:, columns] -= ridge.solve(weight, h, columns)
    return float((difference @ h.double() @ difference.T).trace())


def eliminate(weight: Tensor, h: Tensor, width: int) -> tuple[list[int], list[float]]:
    """OBS on whole granules, everything recomputed from scratch at every step.

    A candidate S costs tr(W_S ([H^-1]_SS)^-1 W_S^T), with H restricted to what is still there and W repaired
    from the dense one in one go.

    Returns:
        granules, most important first, and the error at every number kept (granules + 1 numbers).
    """
    left = list(range(weight.shape[1] // width))
    gone: list[int] = []
    added: list[float] = []
    while left:
        columns = [g * width + j for g in left for j in range(width)]
        repaired = ridge.solve(weight, h, columns)
        inverse = torch.linalg.inv(h.double()[columns][:, columns])
        costs = []
        for place in range(len(left)):
            s = list(range(place * width, (place + 1) * width))
            w = repaired[:, s]
            costs.append(float((w @ torch.linalg.inv(inverse[s][:, s]) @ w.T).trace()))
        best = min(range(len(left)), key=costs.__getitem__)
        gone.append(left.pop(best))
        added.append(costs[best])
    order = gone[::-1]
    error = [sum(added[: len(added) - k]) for k in range(len(added) + 1)]
    return order, error
