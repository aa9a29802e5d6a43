"""calibrate: stream the input statistics of every prunable linear layer."""

from __future__ import annotations

from torch import Tensor

from ffprune.models.view import ModelView
from ffprune.models.walk import collect
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import calibration_windows, last_map, load
from ffprune.stages.record import DENSE, GRAMS, STATS


def run(ctx: StageContext) -> None:
    """Diagonals and means of every layer; full Grams where the repair and the elimination need them."""
    params = ctx.params.calibrate
    windows = calibration_windows(ctx, params.seqlen, params.windows, "calibrate.windows")
    view = ModelView(load(ctx.path(DENSE), ctx.params.compute))
    last = [last_map(view, index) for index in range(len(view.units))]
    full_bytes = sum(4 * view.prunable[name].in_features ** 2 for name in last)
    artifacts.check_room(ctx.path(GRAMS), full_bytes)
    with ctx.progress(len(windows), "calibrate") as bar:
        grams = collect(
            view,
            windows,
            last,
            params.batch_size,
            lambda done, total: bar.advance_to(done, tokens=done * params.seqlen),
        )
    tokens = {"tokens": str(windows.numel()), "windows": str(len(windows)), "seqlen": str(params.seqlen)}
    stats: dict[str, Tensor] = {}
    for name, gram in grams.items():
        stats |= {f"{name}.second_moment": gram.second_moment, f"{name}.mean": gram.mean}
    full = {f"{name}.xx": grams[name].xx for name in last}
    artifacts.write_tensors(ctx.path(STATS), stats, tokens)
    artifacts.write_tensors(ctx.path(GRAMS), {name: xx for name, xx in full.items() if xx is not None}, tokens)
    ctx.log_metrics({"tokens": windows.numel(), "linear_layers": len(grams)})
