"""evaluate: perplexity, sizes, speed and zero-shot accuracy of every model, against the dense one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ffprune.evaluate.footprint import footprint
from ffprune.evaluate.perplexity import perplexity
from ffprune.evaluate.speed import measure
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import load, sample_windows
from ffprune.stages.record import DENSE, EVALUATION, PRUNED, REPAIRED
from ffprune.stages.zero_shot import ask


@dataclass(frozen=True)
class Entry:
    """One model to measure.

    Attributes:
        method: ``dense``, or a name of evaluate.methods.
        folder: where it is saved.
        facts: what the prune stage says of it: granularity, budget, target, sparsity, what is removed of each cost.
    """

    method: str
    folder: Path
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[float, str]:
        """Models of equal shape: a repair changes no shape, so speed is measured once for all of a policy."""
        return self.facts.get("sparsity_target", 0.0), self.method.partition("+")[0]


def run(ctx: StageContext) -> None:
    """Measure everything in one run: ratios to the dense model come from the same minutes on the same machine."""
    params = ctx.params.evaluate
    windows = sample_windows(
        ctx.path(DENSE),
        ctx.path(params.text),
        params.seqlen,
        params.windows,
        ctx.params.seed,
        "evaluate.windows",
    )
    entries = [Entry("dense", ctx.path(DENSE), {}), *_entries(ctx)]
    speeds = _speeds(ctx, entries)
    rows = []
    with ctx.progress(len(entries), "evaluate") as bar:
        for entry in entries:
            row = _measure(ctx, entry, windows) | speeds[entry.shape]
            rows.append(row)
            bar.update(1, method=entry.method, perplexity=row["perplexity"])
            name = "dense" if entry.method == "dense" else f"{entry.method} {entry.facts['sparsity_target']:g}"
            # MLflow allows no '+' in the name of a metric.
            ctx.log_metrics({f"perplexity/{name.replace('+', ' and ')}": row["perplexity"]})
    artifacts.write_json(
        ctx.path(EVALUATION),
        {
            "protocol": {
                "text": params.text,
                "windows": len(windows),
                "seqlen": params.seqlen,
                "tokens": windows.numel() - len(windows),
                "dtype": ctx.params.compute.dtype,
                "seed": ctx.params.seed,
            },
            "dense": rows[0],
            "rows": rows[1:],
        },
    )
    ctx.log_table("results.json", [{k: v for k, v in row.items() if k != "zero_shot"} for row in rows])


def _entries(ctx: StageContext) -> list[Entry]:
    """Models by sparsity, in the order of evaluate.methods."""
    targets = sorted((p for p in ctx.path(PRUNED).iterdir() if p.is_dir()), key=lambda p: float(p.name))
    entries = []
    for target in targets:
        for method in ctx.params.evaluate.methods:
            folder = ctx.path(REPAIRED if "+" in method else PRUNED) / target.name / method
            entries.append(Entry(method, folder, artifacts.read_json(folder.parent / f"{method}.json")))
    return entries


def _measure(ctx: StageContext, entry: Entry, windows: Tensor) -> dict[str, Any]:
    """One row: size, perplexity and, where asked, zero-shot tasks."""
    params = ctx.params.evaluate
    started = time.monotonic()
    model = load(entry.folder, ctx.params.compute)
    size = footprint(model, entry.folder)
    # A broken dense model must stop the stage; a broken pruned one is a result.
    result = perplexity(model, windows, params.batch_size, require_finite=entry.method == "dense")
    row: dict[str, Any] = {"method": entry.method}
    if entry.facts:
        row |= {key: entry.facts[key] for key in ("granularity", "budget", "sparsity_target", "sparsity", "removed")}
    row |= {
        "perplexity": result.value if result.finite else None,
        "nll_stderr": result.stderr,
        "params": size.whole,
        "prunable_params": size.prunable,
        "bytes": size.bytes_on_disk,
        "macs_per_token": size.macs_per_token,
        "kv_cache_bytes_per_token": size.kv_cache_bytes_per_token,
        "path": str(entry.folder),
    }
    if params.zero_shot.tasks and entry.method in ("dense", *params.zero_shot.methods):
        text = ctx.path(ctx.params.evaluate.text)
        row["zero_shot"] = ask(model, ctx.path(DENSE), text, params.zero_shot, ctx.params.seed)
    row["seconds"] = round(time.monotonic() - started, 2)
    return row


def _speeds(ctx: StageContext, entries: list[Entry]) -> dict[tuple[float, str], dict[str, Any]]:
    """Speed per shape; at each sparsity the models take turns with the dense one."""
    params = ctx.params.evaluate.speed
    dense, *others = entries
    targets = sorted({entry.shape[0] for entry in others})
    speeds: dict[tuple[float, str], dict[str, Any]] = {}
    # A round times every model once, and so does the progress bar.
    total = sum(params.repeats * (1 + len({e.shape for e in others if e.shape[0] == t})) for t in targets)
    with ctx.progress(total, "speed") as bar:
        for target in targets:
            shapes = {entry.shape: entry for entry in others if entry.shape[0] == target}
            models = {entry.shape: load(entry.folder, ctx.params.compute) for entry in (dense, *shapes.values())}
            names = {str(shape): shape for shape in models}
            measured = measure(
                {name: models[shape] for name, shape in names.items()},
                params.prefill_tokens,
                params.decode_tokens,
                repeats=params.repeats,
                seed=ctx.params.seed,
                progress=lambda done, total: bar.update(1),
            )
            # The dense model keeps the figures of the first sparsity; ratios are those of a model's own rounds.
            for name, speed in measured.items():
                speeds.setdefault(names[name], {k: v for k, v in asdict(speed).items() if "ratios" not in k})
    return speeds
