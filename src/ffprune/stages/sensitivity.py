"""sensitivity: which granule of a unit goes first, and how much every matrix and every unit matters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ffprune.allocate.curves import loss_curve
from ffprune.core.importance import Ranking, rank
from ffprune.models.curvature import Curvature, output_curvature
from ffprune.models.traces import matrix_traces
from ffprune.models.view import ModelView
from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, calibration_windows, dense_view, gram_tokens, read_grams
from ffprune.stages.record import CURVES, GRAMS, ORDER, TRACES


def run(ctx: StageContext) -> None:
    """Three measurements that the search starts from: rankings, curvatures, Hessian traces."""
    params = ctx.params.sensitivity
    view = dense_view(ctx, torch.float32, differentiated=True)
    grams = read_grams(view, ctx.path(GRAMS))
    rankings = _rankings(ctx, view, grams, params.criterion)
    plain = _rankings(ctx, view, grams, params.plain_criterion)
    del grams  # hundreds of megabytes, which the double derivatives below can use
    traces = _traces(ctx, view)
    view.model.to(dtype=DTYPES[ctx.params.compute.dtype])  # type: ignore[call-arg]
    curvatures = _curvatures(ctx, view)
    tokens = gram_tokens(ctx.path(GRAMS))
    curves = []
    for index, (unit, ranking, curvature) in enumerate(zip(view.units, rankings, curvatures, strict=True)):
        d_out = view.unit_linears(index).last.out_features
        losses = loss_curve(ranking.error.numpy(), curvature.mean, tokens, d_out)
        curves.append(
            {
                "unit": unit.name,
                "curvature": curvature.mean,
                "curvature_stderr": curvature.stderr,
                "loss": [float(f"{loss:.6g}") for loss in losses],
            }
        )
    artifacts.write_tensors(
        ctx.path(ORDER),
        {f"{u.name}.repaired": r.order for u, r in zip(view.units, rankings, strict=True)}
        | {f"{u.name}.plain": r.order for u, r in zip(view.units, plain, strict=True)},
        {"repaired": params.criterion, "plain": params.plain_criterion},
    )
    artifacts.write_json(ctx.path(TRACES), traces)
    artifacts.write_json(ctx.path(CURVES), curves)
    ctx.log_table("traces.json", traces)
    ctx.log_figure(figures.sensitivity(traces, curves), "sensitivity.png")


def _rankings(ctx: StageContext, view: ModelView, grams: list[Tensor], criterion: str) -> list[Ranking]:
    """One ranking per unit; each is a long row of small products, so a thread serves a unit."""
    params = ctx.params.sensitivity
    threads = torch.get_num_threads()

    def job(index: int) -> Ranking:
        torch.set_num_threads(1)
        parts = view.unit_linears(index)
        weight = parts.last.weight.detach().cpu()
        return rank(criterion, weight, grams[index], parts.width[parts.last_role], params.damping, parts.runs)

    rankings = []
    with ctx.progress(len(view.units), criterion) as bar, ThreadPoolExecutor(threads) as pool:
        for ranking in pool.map(job, range(len(view.units))):
            rankings.append(ranking)
            bar.update()
    return rankings


def _traces(ctx: StageContext, view: ModelView) -> list[dict[str, Any]]:
    """Hessian trace of every prunable matrix (MS Eq. 5-6)."""
    params = ctx.params.sensitivity.hutchinson
    windows = calibration_windows(ctx, params.seqlen, params.windows, "sensitivity.hutchinson.windows", 1)
    batches = -(-len(windows) // params.batch_size)
    with ctx.progress(params.probes * batches, "Hessian traces") as bar:
        estimates = matrix_traces(
            view,
            windows,
            params.batch_size,
            params.probes,
            params.product,
            torch.Generator().manual_seed(ctx.params.seed),
            bar.update,
        )
    return [
        {
            "matrix": name,
            "weights": view.prunable[name].weight.numel(),
            "trace": estimate.mean,
            "trace_stderr": estimate.stderr,
            "sensitivity": estimate.mean / view.prunable[name].weight.numel(),
        }
        for name, estimate in estimates.items()
    ]


def _curvatures(ctx: StageContext, view: ModelView) -> list[Curvature]:
    """Fisher curvature of the loss in every unit's output."""
    params = ctx.params.sensitivity.fisher
    windows = calibration_windows(ctx, params.seqlen, params.windows, "sensitivity.fisher.windows", 2)
    with ctx.progress(len(windows), "output curvature") as bar:
        return output_curvature(
            view,
            view.last_maps,
            windows.to(view.model.device),
            params.batch_size,
            torch.Generator(view.model.device).manual_seed(ctx.params.seed),
            lambda done, total: bar.advance_to(done),
        )
