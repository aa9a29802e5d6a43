"""calibrate: stream the input statistics of every prunable linear layer, block by block."""

from __future__ import annotations

from torch import Tensor

from ffprune.models.calibration import Calibration
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import calibration_windows, load, write_grams
from ffprune.stages.record import DENSE, GRAMS, STATS


def run(ctx: StageContext) -> None:
    """Diagonals and means of every layer; full Grams where the repair and the elimination need them.

    Experts that no token came to are ranked by their weights and left without repair; which they are is recorded.
    A layer's full Grams are written before the next layer runs: one layer's are in memory at a time.
    """
    params = ctx.params.calibrate
    windows = calibration_windows(ctx, params.seqlen, params.windows, "calibrate.windows")
    view = ModelView(load(ctx.path(DENSE), ctx.params.compute))
    sizes = (view.unit_linears(index).gram_size for index in range(len(view.units)))
    artifacts.check_room(ctx.path(GRAMS), 4 * sum(sizes))
    unreached: list[str] = []
    stats: dict[str, Tensor] = {}
    with artifacts.atomic_dir(ctx.path(GRAMS)) as folder, ctx.progress(len(view.blocks), "calibrate") as bar:
        layers = Calibration(windows, params.batch_size).grams(view, ("o", "down"))
        for block, grams in zip(view.blocks, layers, strict=True):
            for role in block.linears:
                name = f"layers.{block.index}.{role}"
                stats |= {f"{name}.second_moment": grams[role].second_moment, f"{name}.mean": grams[role].mean}
            unreached += block.unreached(grams["down"])
            write_grams(folder, block.index, grams)
            bar.update()
    tokens = {"tokens": str(windows.numel()), "windows": str(len(windows)), "seqlen": str(params.seqlen)}
    artifacts.write_tensors(ctx.path(STATS), stats, tokens | {"unreached_experts": " ".join(unreached)})
    ctx.log_metrics(
        {"tokens": windows.numel(), "linear_layers": len(view.prunable), "unreached_experts": len(unreached)}
    )
