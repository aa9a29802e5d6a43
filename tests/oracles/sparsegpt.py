"""Twin of ffprune.core.sparsegpt: OBS one weight at a time, every inverse from scratch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles import masks, saliency


def remove(row: Tensor, m: int, h: Tensor) -> Tensor:
    """MS Eq. 3: weight m of one row goes, and those right of it make up for it."""
    inverse = torch.linalg.inv(h[m:, m:])
    changed = row.clone()
    changed[m:] -= row[m] / inverse[0, 0] * inverse[:, 0]
    changed[m] = 0
    return changed


def chosen(weight: Tensor, columns: range, xx: Tensor, h: Tensor, name: str) -> Tensor:
    """Scores of some columns of a matrix as repaired so far; column m sees the columns from m on."""
    found = torch.zeros(len(weight), len(columns), dtype=torch.float64)
    for place, m in enumerate(columns):
        inverse = float(torch.linalg.inv(h[m:, m:])[0, 0])
        for i in range(len(weight)):
            found[i, place] = saliency.score(name, float(weight[i, m]), float(xx[m, m]), inverse)
    return found


def reconstruct(
    weight: Tensor, xx: Tensor, h: Tensor, kept: int, name: str, block: int, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The repaired weight and the mask; h is xx damped, without dead inputs."""
    w = weight.double().clone()
    outputs, width = w.shape
    stays = torch.zeros(outputs, width, dtype=torch.bool)
    done = 0
    for m in range(width):
        if pattern is None and m % block == 0:
            columns = range(m, min(m + block, width))
            total = kept * columns.stop // width
            stays[:, columns] = torch.tensor(masks.keep(chosen(w, columns, xx, h, name), total - done, "matrix"))
            done = total
        if pattern is not None and m % pattern[1] == 0:
            columns = range(m, m + pattern[1])
            stays[:, columns] = torch.tensor(masks.keep_pattern(chosen(w, columns, xx, h, name), *pattern))
        for i in range(outputs):
            if not stays[i, m]:
                w[i] = remove(w[i], m, h)
    return w, stays
