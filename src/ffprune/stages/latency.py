"""latency: time the blocks of the dense model at several widths, if that is what the budget counts."""

from __future__ import annotations

from dataclasses import asdict

from ffprune.core.errors import ParameterError
from ffprune.evaluate.latency import Probe, block_latencies
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import dense_view
from ffprune.stages.lineage import machine
from ffprune.stages.record import LATENCY


def run(ctx: StageContext) -> None:
    """One file of measured milliseconds, with the machine they are of; an empty one under another budget."""
    if ctx.params.search.budget != "latency":
        artifacts.write_json(ctx.path(LATENCY), {})
        return
    probe = Probe(**ctx.params.latency.model_dump())
    view = dense_view(ctx)
    with ctx.progress(1, "latency") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.advance_to(done)

        found = block_latencies(view, probe, show)
    if not sum(len(times.units) * int(times.price[-1]) for times in found.times):
        raise ParameterError(
            f"a budget in the latency of {probe.phase} with {probe.tokens} tokens was asked for",
            f"The decoder layers take no longer than what else this machine does ({found.dense_milliseconds:.3f} ms)",
            "Raise latency.tokens, latency.batch or latency.repeats",
        )
    told = {"dense_milliseconds": found.dense_milliseconds, "sum_milliseconds": found.sum_milliseconds}
    measured_with = {**asdict(probe), "dtype": ctx.params.compute.dtype}
    artifacts.write_json(
        ctx.path(LATENCY),
        {
            "machine": machine(ctx.params.compute.device),
            "measured_with": measured_with,
            **told,
            "times": [asdict(times) for times in found.times],
        },
    )
    ctx.log_metrics(told)
    for times in found.times:
        ctx.log_table(
            f"{times.units[0]}.json",
            [{"kept": k, "milliseconds": t} for k, t in zip(times.kept, times.milliseconds, strict=True)],
        )
