"""A decoder layer run with masked weights, differentiable in the masks: what learns them needs no model (BESA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ffprune.core.masks import mask_from_ranks, ranks
from ffprune.core.saliency import scores
from ffprune.models.blocks import BlockWalk
from ffprune.models.view import ModelView

Error = Callable[[Mapping[str, Tensor]], Tensor]
"""role -> mask ``[out, in]``; the answer is the relative output error of a layer on one batch, a scalar."""

Learn = Callable[[Mapping[str, Tensor], list[Error]], Mapping[str, float]]
"""(role -> ranks ``[out, in]``, an error function per batch) -> role -> pruning rate of that layer's matrices."""


def masked_errors(walk: BlockWalk, wanted: Tensor) -> list[Error]:
    """Output error of the layer that comes next, as a function of masks on its weights; one function a batch.

    The error is that of the published code of BESA: squared error of every feature over the feature's squared norm,
    both summed over the batch's tokens, then the mean over features. (The few features with huge activations would
    otherwise decide alone.)

    Args:
        walk: at the layer.
        wanted: ``[n, seqlen, d]``, the outputs to come near to.

    Returns:
        Functions of role -> mask (any float or bool dtype), differentiable in the masks; roles that are left out
        are not masked. The layer itself does not change.
    """
    weights = _weights(walk)

    def error(rows: slice, batch: int, masks: Mapping[str, Tensor]) -> Tensor:
        masked = {role: weights[role] * mask.to(weights[role].dtype) for role, mask in masks.items()}
        goal = wanted[rows].to(walk.arrive(), torch.float32)
        off = walk.forward(walk.hidden[rows], batch, masked).float() - goal
        return (off.square().sum((0, 1)) / goal.square().sum((0, 1)).clamp_min(1e-12)).mean()

    return [partial(error, rows, batch) for batch, rows in enumerate(walk.batches)]


def prune_in_turn(
    view: ModelView,
    windows: Tensor,
    batch_size: int,
    learn: Learn,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Learn the rates of one layer after the other, each behind pruned predecessors (BESA Alg. 1).

    Weights go in Wanda's order, row by row. The error of a layer is the distance to what the layer itself, dense,
    makes of the same inputs. The model does not change: layers run with masked copies of their weights.

    Args:
        view: the dense model's view; take the model in ``eval()``.
        windows: int64 ``[n, seqlen]``, calibration text.
        batch_size: windows a step.
        learn: the rates of one layer.
        progress: told of layers done and in all.

    Returns:
        Name (``layers.3.q``) -> pruning rate.
    """
    walk = BlockWalk(view, windows, batch_size)
    found: dict[str, float] = {}
    for block in view.blocks:
        grams, dense = walk.observe()
        weights = _weights(walk)
        order = {role: ranks(scores("wanda", weight, grams[role], 0.0), "row") for role, weight in weights.items()}
        rates = learn(order, masked_errors(walk, dense))
        kept = {role: round((1 - rate) * order[role].numel()) for role, rate in rates.items()}
        masked = {role: weights[role] * mask_from_ranks(order[role], kept[role], "row") for role in rates}
        with torch.no_grad():
            outputs = [walk.forward(walk.hidden[rows], batch, masked).cpu() for batch, rows in enumerate(walk.batches)]
        walk.advance(torch.cat(outputs))
        found |= {f"layers.{block.index}.{role}": rate for role, rate in rates.items()}
        if progress is not None:
            progress(block.index + 1, len(view.blocks))
    return found


def _weights(walk: BlockWalk) -> dict[str, Tensor]:
    return {role: linear.weight.detach() for role, linear in walk.view.blocks[walk.position].linears.items()}
