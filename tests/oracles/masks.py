"""Twin of ffprune.core.masks: removal one by one, lowest score first, of equal scores the earlier position."""

from __future__ import annotations

from torch import Tensor


def highest(scores: list[float], kept: int) -> list[bool]:
    stays = [True] * len(scores)
    for _ in range(len(scores) - kept):
        left = [j for j in range(len(scores)) if stays[j]]
        lowest = left[0]
        for j in left:
            if scores[j] < scores[lowest]:
                lowest = j
        stays[lowest] = False
    return stays


def keep(scores: Tensor, kept: int, scope: str) -> list[list[bool]]:
    """Scope row: kept // out a row, and one more in each of the first kept % out rows."""
    rows: list[list[float]] = scores.tolist()
    if scope == "row":
        return [highest(row, kept // len(rows) + (i < kept % len(rows))) for i, row in enumerate(rows)]
    width = len(rows[0])
    flat = highest([score for row in rows for score in row], kept)
    return [flat[i * width : (i + 1) * width] for i in range(len(rows))]


def keep_pattern(scores: Tensor, stay: int, group: int) -> list[list[bool]]:
    """``stay`` of every ``group`` neighbours of a row."""
    return [
        [stays for j in range(0, len(row), group) for stays in highest(row[j : j + group], stay)]
        for row in scores.tolist()
    ]
