"""How much one weight matters: the unstructured criteria (METHODS 5, MS Eq. 2-4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffprune.core.gram import Gram
from ffprune.core.inverse import inverse_factor
from ffprune.core.masks import Scope
from ffprune.core.tables import look_up

Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(weight float ``[out, in]``, diag H float64 ``[in]``, diag H^-1 float64 ``[in]`` or None) -> ``[out, in]``, in the
dtype of the weight. H_mm is that of X^T X without damping, as MS Eq. 4 and OBD print it: it is the error of removing
the weight and doing nothing else. H^-1 is that of the damped H, for another need not exist."""


@dataclass(frozen=True)
class Saliency:
    """One criterion.

    Attributes:
        score: a score per weight; the lowest go first.
        scope: which scores compare with each other.
        needs_inverse: whether ``score`` reads diag H^-1, and so needs a full Gram.
        paper: authors and year.
        section: where it is defined.
        reads_input: whether ``score`` reads H at all, and so needs calibration text.
    """

    score: Score
    scope: Scope
    needs_inverse: bool
    paper: str
    section: str
    reads_input: bool = True


def magnitude(weight: Tensor, diag: Tensor, inverse: Tensor | None) -> Tensor:
    """|W|."""
    del diag, inverse
    return weight.abs()


def wanda(weight: Tensor, diag: Tensor, inverse: Tensor | None) -> Tensor:
    """|W_ij| * ||X_j||_2."""
    del inverse
    return weight.abs() * diag.sqrt().to(weight.dtype)


def obd(weight: Tensor, diag: Tensor, inverse: Tensor | None) -> Tensor:
    """w_m^2 H_mm: the error of the output when nothing makes up for the weight."""
    del inverse
    return weight.square() * diag.to(weight.dtype)


def obs(weight: Tensor, diag: Tensor, inverse: Tensor | None) -> Tensor:
    """w_m^2 / [H^-1]_mm: the error that is left when all other weights of the row make up for it."""
    del diag
    return weight.square() / _given(inverse).to(weight.dtype)


def isc(weight: Tensor, diag: Tensor, inverse: Tensor | None) -> Tensor:
    """w_m^2 (H_mm + 1 / [H^-1]_mm): both errors together."""
    return weight.square() * (diag + 1 / _given(inverse)).to(weight.dtype)


def _given(inverse: Tensor | None) -> Tensor:
    if inverse is None:
        raise ValueError("this criterion reads the diagonal of H^-1")
    return inverse


SALIENCIES: dict[str, Saliency] = {
    "magnitude": Saliency(magnitude, "matrix", False, "Han et al. 2015", "section 3", reads_input=False),
    "wanda": Saliency(wanda, "row", False, "Sun et al. 2023", "Eq. 1"),
    "obd": Saliency(obd, "matrix", False, "LeCun et al. 1989", "MS section 2.2"),
    "obs": Saliency(obs, "matrix", True, "Hassibi and Stork 1992", "MS Eq. 2"),
    "isc": Saliency(isc, "matrix", True, "Shao et al. 2023", "MS Eq. 4"),
}


def scores(name: str, weight: Tensor, gram: Gram, damping: float) -> Tensor:
    """Scores of all weights of one matrix as it is, by the named criterion.

    An input that was always 0 (H_jj = 0) gives its weights score 0 in every criterion that looks at the input, as
    in SparseGPT's code, which zeroes them.

    Args:
        name: a row of :data:`SALIENCIES`.
        weight: float ``[out, in]``.
        gram: of the matrix's input; full if the row needs the inverse.
        damping: lambda relative to mean diag(H), for H^-1; it is not raised where it is too small.

    Returns:
        float32 ``[out, in]``, or float64 for a float64 weight.

    Raises:
        ParameterError: the criterion is unknown, or H cannot be inverted with this damping.
        ValueError: the Gram is diagonal where the row needs the inverse.
    """
    row = look_up(SALIENCIES, name, "criterion")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not row.needs_inverse:
        return row.score(wide, gram.diag, None)
    if gram.xx is None:
        raise ValueError(f"criterion {name!r} needs a full Gram, this one is diagonal")
    factor = inverse_factor(gram.xx, damping, most=damping)
    return row.score(wide.masked_fill(factor.dead, 0), gram.diag, factor.upper.square().sum(0))
