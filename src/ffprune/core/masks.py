"""Which weights of one matrix stay: exact counts whatever the ties, N:M patterns, and ranks for search trials.

One rule everywhere: the lowest score goes first, and of equal scores the one at the earlier position (row by row,
then input by input), which is a stable ascending sort, as Wanda's own code has it (Sun et al. 2023). The published
thresholds (magnitude, SparseGPT) remove every tie with the last one removed, and so more than was asked.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from ffprune.core.errors import ParameterError

Scope = Literal["row", "matrix"]
"""What a weight competes with: the other weights of its output row, or those of the whole matrix."""


def keep_mask(scores: Tensor, kept: int, scope: Scope) -> Tensor:
    """The ``kept`` highest scores.

    In scope ``row`` every row keeps kept // out weights, and the first kept % out rows one more. Rows are not ranked
    against each other for those few, for the scope says that their scores do not compare.

    Args:
        scores: float ``[out, in]``, higher is more important; infinities are allowed.
        kept: weights that stay, 0 to out * in.
        scope: who competes with whom.

    Returns:
        bool ``[out, in]``, True stays, exactly ``kept`` times.

    Raises:
        ValueError: ``kept`` is out of range, or a score is NaN.
    """
    _check(scores, kept)
    if scope == "matrix":
        return _highest(scores.reshape(1, -1), kept).view_as(scores)
    each, more = divmod(kept, scores.shape[0])
    parts = ((scores[:more], each + 1), (scores[more:], each))
    return torch.cat([_highest(rows, count) for rows, count in parts if len(rows)])


def pattern_mask(scores: Tensor, pattern: str) -> Tensor:
    """The N highest scores of every M neighbouring inputs of every row (semi-structured sparsity, METHODS 5).

    Args:
        scores: float ``[out, in]``, higher is more important.
        pattern: "N:M", see :func:`parse_pattern`.

    Returns:
        bool ``[out, in]``, True stays, exactly N times in every group of M.

    Raises:
        ParameterError: the pattern is malformed or does not fit the width.
        ValueError: a score is NaN.
    """
    stay, group = parse_pattern(pattern, scores.shape[1])
    _check(scores)
    return _highest(scores.reshape(-1, group), stay).view_as(scores)


def parse_pattern(pattern: str, width: int | None = None) -> tuple[int, int]:
    """N and M of "N:M": N weights *kept* of every M neighbouring inputs, 0 < N < M.

    Args:
        pattern: such as "2:4" or "4:8".
        width: in_features of the matrix it is for; None: of any.

    Raises:
        ParameterError: it is not of that form, or ``width`` is not a multiple of M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    stay, group = (int(number) for number in found.groups()) if found else (0, 0)
    if not 0 < stay < group:
        raise ParameterError(
            f"pattern {pattern!r} was asked for",
            "A pattern is N:M with 0 < N < M, N weights kept of every M neighbouring inputs, such as 2:4 or 4:8",
            "Change pattern",
        )
    if width is not None and width % group:
        raise ParameterError(
            f"pattern {pattern} was asked for a matrix of {width} inputs",
            f"The inputs must divide into groups of {group}",
            "Take a pattern whose M divides the model's hidden and FFN widths, or none",
        )
    return stay, group


def ranks(scores: Tensor, scope: Scope) -> Tensor:
    """The order of removal, computed once for all counts: rank 0 goes last.

    Args:
        scores: float ``[out, in]``, fewer than 2^31 of them.
        scope: who competes with whom.

    Returns:
        ``[out, in]``, rank inside the row (int16 where in < 32768, else int32) or inside the matrix (int32), such that
        ``mask_from_ranks(ranks(scores, scope), k, scope)`` equals ``keep_mask(scores, k, scope)`` for every k.

    Raises:
        ValueError: a score is NaN.
    """
    _check(scores)
    pools = scores if scope == "row" else scores.reshape(1, -1)
    width = pools.shape[1]
    dtype = torch.int16 if scope == "row" and width < 2**15 else torch.int32
    order = torch.argsort(pools, dim=1, stable=True)
    descending = torch.arange(width - 1, -1, -1, dtype=dtype, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=dtype).scatter_(1, order, descending).view_as(scores)


def mask_from_ranks(ranks: Tensor, kept: int, scope: Scope) -> Tensor:
    """:func:`keep_mask` in one comparison, from :func:`ranks` of the same scope.

    Args:
        ranks: int16 or int32 ``[out, in]``.
        kept: weights that stay, 0 to out * in.
        scope: the one the ranks were made for.

    Returns:
        bool ``[out, in]``, True stays, exactly ``kept`` times.

    Raises:
        ValueError: ``kept`` is out of range.
    """
    _check_count(ranks, kept)
    if scope == "matrix":
        return ranks < kept
    each, more = divmod(kept, ranks.shape[0])
    rows = torch.arange(ranks.shape[0], device=ranks.device)
    return ranks < (each + (rows < more)).to(ranks.dtype)[:, None]


def _highest(scores: Tensor, kept: int) -> Tensor:
    """bool, the ``kept`` highest of each row; by selection, several times faster than by sorting."""
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.shape[1] - kept + 1, dim=1, keepdim=True).values
    above, ties = scores > threshold, scores == threshold
    # Counted from the end, for the last of equal scores stay.
    place = ties.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return above | (ties & (place <= kept - above.sum(1, keepdim=True)))


def _check(scores: Tensor, kept: int = 0) -> None:
    if scores.isnan().any():
        raise ValueError("scores must be numbers, without NaN")
    _check_count(scores, kept)


def _check_count(matrix: Tensor, kept: int) -> None:
    if not 0 <= kept <= matrix.numel():
        raise ValueError(f"{kept} of {matrix.numel()} weights cannot stay")
