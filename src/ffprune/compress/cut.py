"""The final structured pass: block after block, every unit is ranked, cut and repaired on what reaches it now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffprune.core.bias import affine_repair, mean_replacement
from ffprune.core.fluctuation import wifv
from ffprune.core.gram import Gram
from ffprune.core.importance import CRITERIA, Ranking, by_scores, rank
from ffprune.core.ridge import repair as ridge_repair
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation
from ffprune.models.blocks import BlockWalk
from ffprune.models.layer_config import write_layer_config
from ffprune.models.surgery import read_unit, set_unit
from ffprune.models.view import ModelView, UnitLinears

FLUCTUATION = "flap"
"""FLAP's criterion: it reads the mean of the input too, which a Gram holds and X^T X alone does not."""

Mend = Callable[[Tensor, Gram, Tensor, float], tuple[Tensor, Tensor | None]]
"""(dense map [d_out, n], Gram of its input, columns kept, damping) -> (map [d_out, k], bias [d_out] or None)."""


@dataclass(frozen=True)
class Repair:
    """One way to make up for the granules that went.

    Attributes:
        mend: the function; None for the repair that reads more than a Gram, :func:`ffprune.compress.follow.follow`.
        paper: authors and year, or the paper's own name.
        section: where it is defined.
        biases: whether it gives the unit's last map a bias.
        whole: whether it reads all of X^T X.
        experts: whether it goes with mixtures of experts, of whose X^T X there are the blocks on the diagonal.
    """

    mend: Mend | None
    paper: str
    section: str
    biases: bool = False
    whole: bool = True
    experts: bool = False


def _none(weight: Tensor, gram: Gram, kept: Tensor, damping: float) -> tuple[Tensor, None]:
    del gram, damping
    return weight[:, kept], None


def _ridge(weight: Tensor, gram: Gram, kept: Tensor, damping: float) -> tuple[Tensor, None]:
    assert gram.xx is not None
    return ridge_repair(weight, gram.xx, kept, damping), None


def _bias(weight: Tensor, gram: Gram, kept: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    del damping
    return weight[:, kept], mean_replacement(weight, gram.mean, kept)


REPAIRS: dict[str, Repair] = {
    "none": Repair(_none, "-", "the cut stays as it is", whole=False, experts=True),
    "ridge": Repair(_ridge, "FF, SS", "FF Eq. 6-7, SS Eq. 3-10", experts=True),
    "bias": Repair(
        _bias, "An et al. 2024", "FLAP: pruned channels are replaced by their mean", True, whole=False, experts=True
    ),
    "mean+ridge": Repair(affine_repair, "ffprune", "ridge on departures from the mean, and a bias", True),
    "stream": Repair(None, "ffprune", "ridge towards the dense residual stream, damping chosen on held-out text"),
}


def rank_unit(criterion: str, parts: UnitLinears, gram: Gram, damping: float) -> Ranking:
    """A unit's granules from the most to the least important, on the CPU; by FLAP's criterion the error is in its own
    scores.

    Raises:
        ParameterError: the criterion is unknown.
    """
    weight, width = parts.last.weight.detach(), parts.width[parts.last_role]
    if criterion == FLUCTUATION:
        return by_scores(wifv(weight, gram).cpu(), width, parts.runs)
    if gram.xx is None:
        assert not CRITERIA[criterion].whole
        xx = torch.diag(gram.diag) if parts.blocks == 1 else torch.diag_embed(gram.diag.view(parts.blocks, -1))
    else:
        xx = gram.xx
    # An elimination is a long row of small products, each chosen by the one before: a GPU would only wait.
    return rank(criterion, weight.cpu(), xx.cpu(), width, damping, parts.runs)


def reads_whole_gram(criterion: str | None, repair: str | None) -> bool:
    """Whether ranking or repairing reads all of X^T X; its diagonal and means come much cheaper."""
    return (criterion in CRITERIA and CRITERIA[criterion].whole) or REPAIRS[repair or "none"].whole


def cut(
    view: ModelView,
    allocation: Allocation,
    windows: Tensor,
    batch_size: int,
    criterion: str,
    repair: str,
    damping: float,
    dense_inputs: bool,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Make a model physically smaller, in place.

    A block's attention is ranked, cut and repaired on the inputs that reach it behind pruned blocks, then its FFN on
    those that the cut attention leaves it; with ``dense_inputs`` all statistics are the dense model's.

    Args:
        view: the dense model's view; float32 is meant.
        allocation: granules kept per unit of ``view.units``.
        windows: int64 ``[n, seqlen]``, calibration text.
        batch_size: windows a forward pass.
        criterion: row of :data:`ffprune.core.importance.CRITERIA`, or ``flap``.
        repair: row of :data:`REPAIRS` that has a function.
        damping: of every Gram, relative to its mean diagonal.
        dense_inputs: calibrate on the dense model.
        dtype: that layers multiply in; sums and repairs are float32 and float64.
        progress: told of layers done and in all.

    Returns:
        Experts that no token came to, in the FFNs that were cut: ranked by their weights, and not repaired.

    Raises:
        ParameterError: unknown criterion or repair.
        NonFiniteLoss: statistics are not finite.
    """
    if criterion != FLUCTUATION:
        look_up(CRITERIA, criterion, "criterion")
    mend = look_up(REPAIRS, repair, "repair").mend
    assert mend is not None, "follow() does this repair"
    walk, whole = BlockWalk(view, windows, batch_size, dtype), reads_whole_gram(criterion, repair)
    unreached = []
    for block in view.blocks:
        grams, outputs = walk.observe(("o", "down") if whole else ()) if dense_inputs else ({}, None)
        for index in (2 * block.index, 2 * block.index + 1):
            parts, keep = view.unit_linears(index), allocation.kept[index]
            if keep == parts.granules:
                continue
            role = parts.last_role
            gram = grams[role] if dense_inputs else walk.arriving(role, whole)
            if role == "down":
                unreached += block.unreached(gram)
            weight = parts.last.weight.detach()  # the layer is on the device from here on
            kept = torch.sort(rank_unit(criterion, parts, gram, damping).order[:keep], dim=0).values.to(weight.device)
            columns = parts.columns(kept)
            weight, bias = mend(weight, gram, columns, damping)
            set_unit(view, index, read_unit(view, index).select(kept).replace_last(weight))
            if bias is not None:
                _add_bias(parts.last, bias)
        walk.advance(outputs)
        if progress is not None:
            progress(block.index + 1, len(view.blocks))
    write_layer_config(view.model.config, view)
    return unreached


def _add_bias(linear: nn.Linear, bias: Tensor) -> None:
    present = bias if linear.bias is None else linear.bias.detach() + bias
    linear.bias = nn.Parameter(present.to(linear.weight.dtype), requires_grad=False)
