"""The final structured pass that follows the dense model: every repair also undoes what went wrong before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ffprune.compress.cut import rank_unit
from ffprune.core.stream import repair_towards
from ffprune.core.units import Allocation
from ffprune.models.blocks import BlockWalk
from ffprune.models.layer_config import write_layer_config
from ffprune.models.surgery import read_unit, set_unit
from ffprune.models.view import ModelView


def follow(
    view: ModelView,
    allocation: Allocation,
    windows: Tensor,
    batch_size: int,
    ranking: str | Sequence[Tensor],
    damping: float,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Make a model physically smaller, in place, each unit repaired towards the dense model's residual stream.

    The windows go through the dense model and the pruned one side by side, a layer at a time. A cut unit's last map is
    fitted, on the inputs that it now gets, to what makes the stream behind it the dense model's; the damping is chosen
    for every unit on every fourth batch (see :mod:`ffprune.core.stream`).

    Args:
        view: the dense model's view; float32 is meant.
        allocation: granules kept per unit of ``view.units``.
        windows: int64 ``[n, seqlen]``, calibration text.
        batch_size: windows a forward pass; with fewer than four batches nothing is held out.
        ranking: a criterion that ranks every unit on the inputs that reach it now, or, per unit, its granules from the
            most to the least important, int64 ``[granules]``.
        damping: of the ranking, and of the repair where nothing is held out; relative to a Gram's mean diagonal.
        dtype: that layers multiply in; sums and repairs are float32 and float64.
        progress: told of layers done and in all.

    Returns:
        Unit -> the damping of its repair, for the units that were cut.

    Raises:
        ParameterError: unknown criterion.
        UnsupportedArchitecture: the layers do more with their units' outputs than add them.
        NonFiniteLoss: statistics are not finite.
    """
    dense, walk = (BlockWalk(view, windows, batch_size, dtype) for _ in range(2))
    dampings: dict[str, float] = {}
    for block in view.blocks:
        targets = dense.streams()
        dense.advance(targets["down"])
        outputs = None
        for index in (2 * block.index, 2 * block.index + 1):
            parts, keep = view.unit_linears(index), allocation.kept[index]
            if keep == parts.granules:
                continue
            role, weight = parts.last_role, parts.last.weight.detach()
            distance = walk.distance(role, targets.pop(role))
            if isinstance(ranking, str):
                order = rank_unit(ranking, parts, distance.fit.gram.merge(distance.held.gram), damping).order
            else:
                order = ranking[index]
            kept = torch.sort(order[:keep], dim=0).values.to(weight.device)
            columns = parts.columns(kept)
            repaired, chosen = repair_towards(weight, distance.fit, distance.held, columns, damping)
            dampings[view.units[index].name] = chosen
            if distance.end is not None:
                outputs = distance.end.replaced(parts.last, columns, repaired)
            del distance  # the largest tensors here, which the next unit need not stand beside
            set_unit(view, index, read_unit(view, index).select(kept).replace_last(repaired))
        walk.advance(outputs)
        if progress is not None:
            progress(block.index + 1, len(view.blocks))
    write_layer_config(view.model.config, view)
    return dampings
