"""In which order the granules of one unit go: one-shot scores, and elimination that knows the repair.

Every criterion answers with a :class:`Ranking`: the granules from the most to the least important, so that any
retention is a prefix, and the error that each prefix leaves.

Throughout, ``weight`` is the unit's last linear map (o_proj or down_proj), float ``[d_out, n]``, ``xx`` its input
Gram X^T X, float ``[n, n]``, and a granule is ``width`` columns: neighbours (1 for an FFN channel; query heads
times head size for a key/value group), or, where a granule is a query head of every group, as many in each of ``runs``
equal stretches. Every run then has an order of its own, and granule k is what comes k-th in each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.gram import block_dampings, damped
from ffprune.core.tables import look_up

_PANEL = 64
"""Eliminations between two matrix-matrix updates; it changes the speed, not the result."""


@dataclass(frozen=True)
class Ranking:
    """Order of removal inside one unit.

    Attributes:
        order: int64 ``[granules]``, or ``[granules, runs]``, most important first: keeping k granules keeps
            ``order[:k]``.
        error: float64 ``[granules + 1]``; ``error[k]`` is the squared error of the last linear map's output, summed
            over the calibration tokens and outputs, when k granules are kept. ``error[granules] == 0``.
    """

    order: Tensor
    error: Tensor


Rank = Callable[[Tensor, Tensor, int, float, int], Ranking]


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Attributes:
        rank: (weight, xx, width, damping, runs) -> ranking.
        paper: authors and year, or the paper's own name.
        section: where it is defined.
        whole: whether it reads all of X^T X, not its diagonal alone.
    """

    rank: Rank
    paper: str
    section: str
    whole: bool


def by_scores(columns: Tensor, width: int, runs: int = 1) -> Ranking:
    """Rank by a score per column, float64 ``[n]``, whose sum over what is removed stands for the error."""
    scores = columns.view(runs, -1, width // runs).sum(2).T  # [granules, runs]
    order = torch.argsort(scores, dim=0, descending=True, stable=True)
    sorted_scores = scores.gather(0, order).sum(1)
    removed = torch.flip(torch.cumsum(torch.flip(sorted_scores, (0,)), 0), (0,))
    return Ranking(_plain(order), torch.cat([removed, removed.new_zeros(1)]))


def _plain(order: Tensor) -> Tensor:
    """``[granules]`` where there is one run."""
    return order.flatten() if order.shape[1] == 1 else order


def activation_norm(weight: Tensor, xx: Tensor, width: int, damping: float, runs: int = 1) -> Ranking:
    """Squared l2-norm of the activations that enter the last linear map (SS, section 3.1), summed over a granule."""
    del weight, damping
    return by_scores(xx.diagonal().double(), width, runs)


def wanda_column(weight: Tensor, xx: Tensor, width: int, damping: float, runs: int = 1) -> Ranking:
    """Wanda scores aggregated over a channel's output column (FF): ||W_:,j||^2 * ||X_j||^2, summed over a granule."""
    del damping
    return by_scores(weight.double().square().sum(0) * xx.diagonal().double(), width, runs)


def compensated_elimination(weight: Tensor, xx: Tensor, width: int, damping: float, runs: int = 1) -> Ranking:
    """Backward elimination by the error that is left *after* the repair (OBS, MS Eq. 2-3, on whole granules).

    One granule S goes at a time: the one with the least tr(W_S ([H^-1]_SS)^-1 W_S^T), H = X^T X + lambda I, where
    W and H^-1 are those of the granules still there, W already repaired for all that went before.

    Args:
        weight: ``[d_out, n]``.
        xx: ``[n, n]``.
        width: columns of one granule.
        damping: lambda, relative to the mean of diag(xx).
        runs: stretches of columns; a part goes from each of them in turn.
    """
    weight, xx = weight.double(), xx.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(xx, damping)))
    if width == 1:
        removed, added = _eliminate_columns(weight, inverse)
    else:
        removed, added = _eliminate_groups(weight, inverse, width // runs, runs)
    # A round takes a part from every run: together the parts are a granule.
    parts, added = removed.view(-1, runs), added.view(-1, runs).sum(1)
    error = torch.cat([torch.flip(torch.cumsum(added, 0), (0,)), added.new_zeros(1)])
    return Ranking(_plain(torch.flip(parts, (0,)) % len(parts)), error)


def _eliminate_columns(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy elimination of single columns in panels.

    With c = [H^-1]_:,p, u = c / sqrt(c_p) and A = W^T W, removing p turns H^-1 into H^-1 - u u^T and A into
    A - (v u^T + u v^T), v = A_:,p / sqrt(c_p) - A_pp / (2 c_p) u. The choice needs only both diagonals, so the
    matrices themselves are brought up to date once a panel, by matrix products.

    Returns:
        columns in the order of their removal (int64 ``[n]``) and the error each removal added (float64 ``[n]``).
    """
    n = weight.shape[1]
    names, gram = torch.arange(n), weight.T @ weight
    removed, added = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.float64)
    done = 0
    while done < n:
        size = min(_PANEL, n - done)
        diag, norms = inverse.diagonal().clone(), gram.diagonal().clone()
        u_panel, v_panel = inverse.new_zeros(size, len(names)), inverse.new_zeros(size, len(names))
        alive = torch.ones(len(names), dtype=torch.bool)
        for i in range(size):
            p = int(torch.where(alive, norms / diag, torch.inf).argmin())
            u_past, v_past = u_panel[:i], v_panel[:i]
            root = diag[p].sqrt()
            # Both matrices are symmetric: a row is read where the formula says column, for it is contiguous.
            u = (inverse[p] - u_past[:, p] @ u_past) / root
            column = gram[p] - u_past[:, p] @ v_past - v_past[:, p] @ u_past
            v = column / root - norms[p] / (2 * diag[p]) * u
            removed[done + i], added[done + i] = names[p], norms[p] / diag[p]
            u_panel[i], v_panel[i] = u, v
            diag, norms = diag - u * u, (norms - 2 * u * v).clamp_min(0)
            alive[p] = False
        rest = torch.nonzero(alive).flatten()
        u, v, names = u_panel[:, rest], v_panel[:, rest], names[rest]
        inverse = torch.addmm(inverse[rest][:, rest], u.T, u, alpha=-1)
        gram = torch.addmm(gram[rest][:, rest], torch.cat([u, v]).T, torch.cat([v, u]), alpha=-1)
        done += size
    return removed, added


def _eliminate_groups(weight: Tensor, inverse: Tensor, width: int, runs: int = 1) -> tuple[Tensor, Tensor]:
    """Greedy elimination of groups of ``width`` columns, of every run in turn; every candidate is solved: few are."""
    names = torch.arange(weight.shape[1] // width)
    in_run = len(names) // runs
    removed: list[int] = []
    added: list[float] = []
    while len(names):
        # Neighbours are a run; a run has lost as many groups as the others, or one more.
        others = (names // in_run).ne(len(removed) % runs)
        blocks = [slice(i * width, (i + 1) * width) for i in range(len(names))]
        # solved[i] = ([H^-1]_SS)^-1 W_S^T
        solved = [torch.linalg.solve(inverse[s, s], weight[:, s].T) for s in blocks]
        errors = torch.stack([(weight[:, s].T * x).sum() for s, x in zip(blocks, solved, strict=True)])
        best = int(torch.argmin(errors.masked_fill(others, torch.inf)))
        gone = blocks[best]
        rest = torch.cat([torch.arange(s.start, s.stop) for s in blocks if s != gone] or [names.new_empty(0)])
        weight = weight[:, rest] - solved[best].T @ inverse[gone][:, rest]
        inverse = inverse[rest][:, rest] - inverse[rest, gone] @ torch.linalg.solve(
            inverse[gone, gone], inverse[gone][:, rest]
        )
        removed.append(int(names[best]))
        added.append(float(errors[best]))
        names = torch.cat([names[:best], names[best + 1 :]])
    return torch.tensor(removed, dtype=torch.int64), torch.tensor(added, dtype=torch.float64)


CRITERIA: dict[str, Criterion] = {
    "activation_norm": Criterion(activation_norm, "SparsitySolver", "SS section 3.1", whole=False),
    "wanda_column": Criterion(wanda_column, "FastForward Pruning", "FF section 2.1", whole=False),
    "compensated_elimination": Criterion(
        compensated_elimination, "ffprune", "OBS (MS Eq. 2-3) on whole granules", whole=True
    ),
}


def rank(criterion: str, weight: Tensor, xx: Tensor, width: int, damping: float, runs: int = 1) -> Ranking:
    """Rank a unit's granules by the named criterion.

    Args:
        criterion: row of :data:`CRITERIA`.
        weight: ``[d_out, n]``.
        xx: ``[n, n]``; or ``[runs, n / runs, n / runs]``, blocks on the diagonal: every run then is ranked by itself.
        width: columns of one granule.
        damping: lambda, relative to the mean of the whole diagonal.
        runs: stretches of columns that a granule has a part in.

    Raises:
        ParameterError: the criterion is unknown.
    """
    found = look_up(CRITERIA, criterion, "sensitivity.criterion").rank
    if xx.ndim == 2:
        return found(weight, xx, width, damping, runs)
    rankings = [
        # Where no token came, only the weights can tell, and no order costs anything.
        by_scores(part.double().square().sum(0), width // runs)
        if own is None
        else found(part, block, width // runs, own, 1)
        for part, block, own in zip(weight.chunk(runs, 1), xx, block_dampings(xx, damping), strict=True)
    ]
    reached = [ranking.error * bool(block.any()) for ranking, block in zip(rankings, xx, strict=True)]
    return Ranking(torch.stack([ranking.order for ranking in rankings], 1), torch.stack(reached).sum(0))
