"""Streamed second moments of one linear layer's input (METHODS 5 and 7): gather, then solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.errors import ParameterError


@dataclass
class Gram:
    """Sums over calibration tokens x of an input of width n; see :meth:`zeros`, then :meth:`update`.

    Attributes:
        n: width of the input (in_features).
        xx: float32 ``[n, n]``, sum of x x^T (H = X^T X in METHODS 5, G in METHODS 7); None: diagonal only. Of a mixture
            of experts, ``[experts, n / experts, n / experts]``: the blocks on its diagonal, an expert's channels each.
        diag: float64 ``[n]``, sum of x^2.
        total: float64 ``[n]``, sum of x.
        count: tokens seen.
    """

    n: int
    xx: Tensor | None
    diag: Tensor
    total: Tensor
    count: int

    @classmethod
    def zeros(cls, n: int, full: bool, device: torch.device | str = "cpu", blocks: int = 1) -> Gram:
        """A Gram of no tokens.

        Args:
            n: width of the input.
            full: keep ``xx`` (4 n^2 / blocks bytes), not only the diagonal (8 n bytes).
            device: where the sums live.
            blocks: equal stretches of the input between which no products are kept.
        """
        shape = (n, n) if blocks == 1 else (blocks, n // blocks, n // blocks)
        return cls(
            n=n,
            xx=torch.zeros(shape, dtype=torch.float32, device=device) if full else None,
            diag=torch.zeros(n, dtype=torch.float64, device=device),
            total=torch.zeros(n, dtype=torch.float64, device=device),
            count=0,
        )

    def update(self, x: Tensor) -> Gram:
        """Add tokens **in place**: a copy of ``xx`` a batch would double the memory of a walk.

        Products are computed in float32 whatever the dtype of ``x``; ``diag`` and ``total`` are summed in
        float64.

        Args:
            x: ``[..., n]``, any float dtype and device; each row of n is a token.

        Returns:
            self, changed.

        Raises:
            ValueError: the last dimension of ``x`` is not n.
        """
        if x.shape[-1] != self.n:
            raise ValueError(f"the Gram is of width {self.n}, the input of shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.n).to(self.diag.device, torch.float32)
        # Sums of one batch are taken in float32, which is several times faster; only their sum runs over all tokens.
        if self.xx is None:
            self.diag += rows.square().sum(0)
        else:
            self.xx.addmm_(rows.T, rows)
            self.diag = self.xx.diagonal().double()
        self.total += rows.sum(0)
        self.count += rows.shape[0]
        return self

    def update_blocks(self, parts: Sequence[Tensor], count: int) -> Gram:
        """Add tokens that are zero in all blocks but a few, **in place**.

        Args:
            parts: per block, ``[rows, n / blocks]``, the tokens that are not zero there.
            count: tokens in all.

        Returns:
            self, changed.
        """
        stretches = zip(self.diag.chunk(len(parts)), self.total.chunk(len(parts)), strict=True)
        for block, (part, (diag, total)) in enumerate(zip(parts, stretches, strict=True)):
            rows = part.detach().to(self.diag.device, torch.float32)
            if self.xx is not None:
                self.xx[block].addmm_(rows.T, rows)
            diag += rows.square().sum(0)
            total += rows.sum(0)
        self.count += count
        return self

    def merge(self, other: Gram) -> Gram:
        """The Gram of both sets of tokens; the order of merging matters only to float rounding.

        Args:
            other: of the same width, and full if and only if this one is.

        Returns:
            A new Gram on this one's device.

        Raises:
            ValueError: the widths differ, or only one is full.
        """
        if self.n != other.n or (self.xx is None) != (other.xx is None):
            raise ValueError(
                f"cannot merge Grams of widths {self.n} (full: {self.xx is not None}) "
                f"and {other.n} (full: {other.xx is not None})"
            )
        device = self.diag.device
        return Gram(
            n=self.n,
            xx=None if self.xx is None or other.xx is None else self.xx + other.xx.to(device),
            diag=self.diag + other.diag.to(device),
            total=self.total + other.total.to(device),
            count=self.count + other.count,
        )

    def _per_token(self, sums: Tensor) -> Tensor:
        if self.count == 0:
            raise ValueError("a Gram of no tokens has no moments: update it first")
        return sums / self.count

    @property
    def mean(self) -> Tensor:
        """float64 ``[n]``: mean of x over tokens. Raises ValueError without tokens."""
        return self._per_token(self.total)

    @property
    def second_moment(self) -> Tensor:
        """float64 ``[n]``: mean of x^2 over tokens (diag / count). Raises ValueError without tokens."""
        return self._per_token(self.diag)

    @property
    def variance(self) -> Tensor:
        """float64 ``[n]``: population variance, E[x^2] - E[x]^2, at least 0 (Var_j of FLAP, METHODS 5).

        Raises ValueError without tokens.
        """
        return (self.second_moment - self.mean.square()).clamp_min(0)


def damped(xx: Tensor, damping: float, absolute: bool = False) -> Tensor:
    """G + lambda I (METHODS 7).

    Args:
        xx: float ``[n, n]``; not changed.
        damping: lambda as a share of mean diag(G); 0 or more.
        absolute: ``damping`` is lambda itself, the papers' reading (0.01 in FF, 0.9 in SS).

    Returns:
        A new matrix of the dtype and device of ``xx``.

    Raises:
        ParameterError: negative or NaN damping.
    """
    if not damping >= 0:
        raise ParameterError(f"damping {damping} was asked for", "Damping is 0 or more", "Raise the damping")
    strength = damping if absolute else damping * float(xx.diagonal().mean(dtype=torch.float64))
    result = xx.clone()
    result.diagonal().add_(strength)
    return result


def block_dampings(xx: Tensor, damping: float) -> list[float | None]:
    """Dampings of the blocks on a Gram's diagonal, each relative to its own block, that add the same lambda to all.

    lambda is a share of the mean of the *whole* diagonal: an expert that few tokens reached is damped the more.

    Args:
        xx: float ``[blocks, n, n]``.
        damping: lambda as a share of the mean of all diagonals.

    Returns:
        One a block; None for a block that no token reached.
    """
    means = xx.diagonal(dim1=1, dim2=2).mean(1, dtype=torch.float64)
    return [damping * float(means.mean() / mean) if mean > 0 else None for mean in means]
