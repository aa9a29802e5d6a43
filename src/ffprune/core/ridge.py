"""Ridge repair of a unit's last linear map (FF Eq. 6-7, SS Eq. 3-10; METHODS 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.gram import block_dampings, damped


def repair(weight: Tensor, xx: Tensor, kept: Tensor, damping: float, absolute: bool = False) -> Tensor:
    """Fold the removed input columns into the kept ones: W_R + W_P G_PR (G_RR + lambda I)^-1.

    Args:
        weight: float ``[d_out, n]``, the dense map.
        xx: float ``[n, n]``, Gram of its dense input, X^T X; or ``[blocks, n / blocks, n / blocks]``, the blocks on its
            diagonal, each of which is repaired by itself.
        kept: int64 ``[k]``, the columns that stay (R), in the order they are wanted; block by block where there are
            several.
        damping: lambda; relative to mean diag(xx), or absolute as the papers print it.
        absolute: how ``damping`` is read.

    Returns:
        float ``[d_out, k]`` in the dtype of ``weight``, computed in float64.
    """
    if xx.ndim == 3:
        return _repair_blocks(weight, xx, kept, damping, absolute)
    n = weight.shape[1]
    mask = torch.ones(n, dtype=torch.bool)
    mask[kept] = False
    removed = torch.nonzero(mask).flatten()
    if len(removed) == 0:
        return weight[:, kept].clone()
    wide, gram = weight.double(), xx.double()
    g_rr = damped(gram, damping, absolute)[kept][:, kept]
    coefficients = torch.cholesky_solve(gram[kept][:, removed], torch.linalg.cholesky(g_rr))  # S*, [k, p]
    return (wide[:, kept] + wide[:, removed] @ coefficients.T).to(weight.dtype)


def _repair_blocks(weight: Tensor, xx: Tensor, kept: Tensor, damping: float, absolute: bool) -> Tensor:
    repaired = []
    shares = block_dampings(xx, damping)
    for number, (part, block, share) in enumerate(zip(weight.chunk(len(xx), 1), xx, shares, strict=True)):
        width = len(block)
        own = kept[kept // width == number] - number * width
        if share is None:  # where no token came, there is nothing to make up for
            repaired.append(part[:, own])
        else:
            repaired.append(repair(part, block, own, damping if absolute else share, absolute))
    return torch.cat(repaired, 1)


@dataclass(frozen=True)
class PrefixRidge:
    """The repair at *every* prefix of one fixed order, from a single factorisation (METHODS 7).

    Attributes:
        weight: float32 ``[d_out, n]``, the dense map, columns in the order of importance.
        factor: float32 ``[n, n]``, lower Cholesky factor L of the ordered Gram + lambda I.
        product: float32 ``[d_out, n]``, M = W L.
    """

    weight: Tensor
    factor: Tensor
    product: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of it."""
        return self.weight.nbytes + self.factor.nbytes + self.product.nbytes

    @classmethod
    def prepare(cls, weight: Tensor, xx: Tensor, order: Tensor, damping: float) -> PrefixRidge:
        """Factorise once.

        Args:
            weight: float ``[d_out, n]``.
            xx: float ``[n, n]``.
            order: int64 ``[n]``, columns, most important first.
            damping: lambda relative to mean diag(xx).
        """
        wide = weight[:, order].double()
        factor = torch.linalg.cholesky(damped(xx.double(), damping)[order][:, order])
        return cls(wide.float(), factor.float(), (wide @ factor).float())

    def at(self, k: int) -> Tensor:
        """The repaired map when the first k columns stay: M_:,:k L_:k,:k^-1, float32 ``[d_out, k]``."""
        if k == self.weight.shape[1]:
            return self.weight
        solved: Tensor = torch.linalg.solve_triangular(
            self.factor[:k, :k], self.product[:, :k], upper=False, left=False
        )
        return solved

    def extend(self, below: Tensor, k: int) -> Tensor:
        """:meth:`at`, from the repaired map of a shorter prefix.

        X_1 L_11 = M_1 there; here X_2 L_22 = M_2 and X_1' = X_1 - X_2 L_21 L_11^-1: as many rows to solve for as
        columns come, in place of d_out.

        Args:
            below: float ``[d_out, j]``, j < k.
            k: columns that stay.

        Returns:
            float32 ``[d_out, k]``, as exact as ``below``.
        """
        j = below.shape[1]
        corner = torch.linalg.solve_triangular(self.factor[j:k, j:k], self.product[:, j:k], upper=False, left=False)
        back = torch.linalg.solve_triangular(self.factor[:j, :j], self.factor[j:k, :j], upper=False, left=False)
        return torch.cat([torch.addmm(below.float(), corner, back, alpha=-1), corner], 1)
