"""What allocators may ask to know of a dense model, measured on calibration text when one asks.

Every function takes the dense view in float32 and the calibration windows, and returns arrays in the order of the
units, as :class:`ffprune.allocate.request.Evidence` holds them. ``calibration`` is how layers are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffprune.allocate.curves import loss_curve
from ffprune.core.fluctuation import wifv
from ffprune.core.gram import Gram
from ffprune.core.importance import Ranking
from ffprune.core.masks import mask_from_ranks, ranks
from ffprune.core.outliers import outlier_share
from ffprune.core.saliency import SALIENCIES, scores
from ffprune.models.calibration import Calibration
from ffprune.models.curvature import output_curvature
from ffprune.models.traces import matrix_traces
from ffprune.models.view import ModelView
from ffprune.stages.sections import Fisher, Hutchinson

Floats = NDArray[np.float64]
_LEVELS = 20
"""Levels of a matrix's loss curve: steps of 5% of its weights."""


def outlier_shares(view: ModelView, calibration: Calibration, multiple: float) -> Floats:
    """OWL: per matrix, the share of outliers among its layer's pooled Wanda scores, float64 ``[matrices]``."""
    found = []
    for block, grams in zip(view.blocks, calibration.grams(view, ()), strict=True):
        pooled = [scores("wanda", linear.weight.detach(), grams[role], 0.0) for role, linear in block.linears.items()]
        found += [outlier_share(pooled, multiple)] * len(pooled)
    return np.array(found)


def granule_scores(view: ModelView, calibration: Calibration) -> list[Floats]:
    """FLAP: per structured unit, the fluctuation score of every input column of its last map, float64 ``[n]``.

    Columns are granule by granule; of experts, granule k is what comes k-th in each.
    """
    found = []
    for index, gram in enumerate(last_grams(view, calibration, whole=False)):
        parts = view.unit_linears(index)
        scores = wifv(parts.last.weight.detach(), gram).cpu().view(parts.runs, parts.granules, -1)
        # In every run another granule is the best, the second ...: they go together.
        order = scores.sum(2).argsort(1, descending=True)
        best_first = scores.gather(1, order[..., None].expand_as(scores)).transpose(0, 1)
        found.append((best_first if parts.runs > 1 else scores).flatten().numpy())
    return found


def unit_curves(
    view: ModelView, rankings: Sequence[Ranking], windows: Tensor, fisher: Fisher, seed: int
) -> list[Floats]:
    """Per structured unit, ranked on all the windows: the predicted loss at every number of granules."""
    return [
        loss_curve(ranking.error.numpy(), curvature, windows.numel(), last.out_features)
        for ranking, curvature, last in zip(
            rankings, _curvatures(view, view.last_maps, windows, fisher, seed), view.last_maps, strict=True
        )
    ]


def matrix_curves(
    view: ModelView, calibration: Calibration, criterion: str, damping: float, fisher: Fisher, seed: int
) -> list[Floats]:
    """Per matrix, the predicted loss at equally spaced retentions when the criterion masks its weights.

    The error of the output, tr(D G D^T) with D the weights removed and G their input's Gram, counts what removed
    weights do together; a reconstruction would leave less, by a factor that is much the same everywhere.
    """
    curvature = dict(
        zip(
            view.prunable,
            _curvatures(view, list(view.prunable.values()), calibration.windows, fisher, seed),
            strict=True,
        )
    )
    scope = SALIENCIES[criterion].scope
    found = []
    for block, grams in zip(view.blocks, calibration.grams(view), strict=True):
        for role, linear in block.linears.items():
            weight, gram = linear.weight.detach(), grams[role]
            assert gram.xx is not None
            order = ranks(scores(criterion, weight, gram, damping), scope)
            error = np.zeros(_LEVELS + 1)
            for level in range(_LEVELS):
                kept = round(level / _LEVELS * weight.numel())
                removed = weight.masked_fill(mask_from_ranks(order, kept, scope), 0)
                error[level] = float((removed @ gram.xx).mul_(removed).sum())
            found.append(loss_curve(error, curvature[f"layers.{block.index}.{role}"], gram.count, linear.out_features))
    return found


def sensitivity(view: ModelView, windows: Tensor, params: Hutchinson, seed: int) -> Floats:
    """MS Eq. 6: per matrix, the Hessian trace over the matrix's weights, float64 ``[matrices]``."""
    chosen, generator = windows[: params.windows, : params.seqlen], torch.Generator().manual_seed(seed)
    traces = matrix_traces(view, chosen, params.batch_size, params.probes, params.product, generator)
    return np.array([traces[name].mean / linear.weight.numel() for name, linear in view.prunable.items()])


def _curvatures(view: ModelView, maps: list[nn.Linear], windows: Tensor, fisher: Fisher, seed: int) -> list[float]:
    chosen = windows[: fisher.windows, : fisher.seqlen].to(view.model.device)
    generator = torch.Generator(view.model.device).manual_seed(seed)
    return [found.mean for found in output_curvature(view, maps, chosen, fisher.batch_size, generator)]


def last_grams(view: ModelView, calibration: Calibration, whole: bool) -> Iterator[Gram]:
    """The Gram of every unit's last map, of one layer at a time; ``whole`` or diagonal and mean."""
    for grams in calibration.grams(view, ("o", "down") if whole else ()):
        yield from (grams["o"], grams["down"])
