"""Ridge repair towards the dense model's residual stream, its damping chosen on text that it has not seen.

METHODS 7 repairs a unit for the output that its own dense map would have given. But the inputs of a unit behind pruned
ones are no longer the dense model's, and the residual stream that it adds to is off already: a target that holds both
lets every repair undo some of what the units before it did. Least squares would also learn what is peculiar to the
calibration text, and the more so the further the target is from the map's own output; held-out text says how far to go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.gram import Gram, damped

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Lambdas to choose from, relative to the mean diagonal of the Gram."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of a unit's whole input x and of what its dense map W leaves to be wished, e = target - W x.

    Attributes:
        gram: full Gram of x, of width n.
        cross: float32 ``[d_out, n]``, sum of e x^T.
    """

    gram: Gram
    cross: Tensor

    @classmethod
    def zeros(cls, n: int, d_out: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no tokens."""
        return cls(Gram.zeros(n, full=True, device=device), torch.zeros(d_out, n, device=device))

    def update(self, x: Tensor, e: Tensor) -> None:
        """Add tokens in place.

        Args:
            x: ``[..., n]``.
            e: ``[..., d_out]``, of the same tokens.
        """
        self.gram.update(x)
        self.cross.addmm_(e.flatten(0, -2).float().T, x.flatten(0, -2).float())

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens."""
        return Moments(self.gram.merge(other.gram), self.cross + other.cross)


def repair_towards(weight: Tensor, fit: Moments, held: Moments, kept: Tensor, damping: float) -> tuple[Tensor, float]:
    """The kept columns that come nearest to the target: W_R + (W_P G_PR + E_R) (G_RR + lambda I)^-1.

    With no wish left (E = 0) it is the repair of METHODS 7. Lambda pulls towards the dense columns W_R.

    Args:
        weight: float ``[d_out, n]``, the dense map W.
        fit: of the tokens to learn from.
        held: of other tokens, on which lambda is chosen among :data:`DAMPINGS`; of no tokens: lambda is ``damping``.
        kept: int64 ``[k]``, the columns that stay (R), in the order they are wanted.
        damping: lambda relative to the mean diagonal, where there is nothing to choose it on.

    Returns:
        float ``[d_out, k]`` in the dtype of ``weight``, computed in float64, from all tokens, and the lambda chosen.
    """
    learnt = _Normal.of(weight, fit, kept)
    if held.gram.count:
        unseen = _Normal.of(weight, held, kept)
        damping = min(DAMPINGS, key=lambda strength: unseen.error(learnt.change(strength)))
        learnt = _Normal(learnt.inner + unseen.inner, learnt.wish + unseen.wish, learnt.mean + unseen.mean)
    return (weight[:, kept].double() + learnt.change(damping)).to(weight.dtype), damping


@dataclass(frozen=True)
class _Normal:
    """The normal equations of what is to be added to W_R, in float64.

    Attributes:
        inner: ``[k, k]``, G_RR.
        wish: ``[d_out, k]``, sum of (target - W_R x_R) x_R^T.
        mean: mean of the whole G's diagonal.
    """

    inner: Tensor
    wish: Tensor
    mean: float

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, kept: Tensor) -> _Normal:
        gram = moments.gram.xx
        assert gram is not None
        columns = gram[:, kept].double()
        lost = weight.double().index_fill(1, kept, 0.0)
        wish = lost @ columns + moments.cross[:, kept].double()
        return cls(columns[kept], wish, float(gram.diagonal().mean(dtype=torch.float64)))

    def change(self, damping: float) -> Tensor:
        """The ridge solution, ``[d_out, k]``."""
        inner = damped(self.inner, damping * self.mean, absolute=True)
        return torch.cholesky_solve(self.wish.T, torch.linalg.cholesky(inner)).T

    def error(self, change: Tensor) -> float:
        """Squared distance from the target summed over tokens, less a constant."""
        return float((change * (change @ self.inner - 2 * self.wish)).sum())
