"""decide: for one recipe of a study, how much of every unit stays.

A stage of its own, so that a search is not made again when the cut that follows it, a text or a task changes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffprune.allocate.request import Decision, Looked
from ffprune.models.view import ModelView
from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.deciding import Deciding
from ffprune.stages.inputs import DTYPES, load, recipe_windows, validation_windows
from ffprune.stages.recipes import check_onload, rows_of
from ffprune.stages.record import DENSE
from ffprune.stages.search_journal import SearchJournal
from ffprune.stages.search_store import SearchStore

_SHOWN_POLICIES = 6
"""Trials of a search whose policies are kept (SS Fig. 13)."""


def run(ctx: StageContext) -> None:
    """Decide; a compressor without units gets a decision without any."""
    name = ctx.stage.key
    recipe = ctx.params.methods[name]
    check_onload(name, recipe, ctx.params.compute)
    if rows_of(name, recipe)[1].granularity not in ("structured", "unstructured"):
        artifacts.write_json(ctx.path(ctx.stage.outs[0]), _written(None, [], 0.0))
        return
    study, dtype = ctx.params.study, DTYPES[ctx.params.compute.dtype]
    deciding = Deciding(
        name=name,
        recipe=recipe,
        study=study,
        view=ModelView(load(ctx.path(DENSE), ctx.params.compute, torch.float32)),
        calibration=recipe_windows(ctx, name, recipe, study),
        validation=lambda: validation_windows(ctx, study.search.seqlen, "study.search.seqlen"),
        dtype=dtype,
        trial_dtype=dtype,
        seed=ctx.params.seed,
        workers=ctx.workers,
        store=lambda sparsity: SearchStore(_folder(ctx, sparsity), deciding.units),
        journal=lambda: SearchJournal(_folder(ctx, recipe.sparsity)),
    )
    deciding.check()
    started = time.monotonic()
    decision = _decide(ctx, deciding)
    written = _written(decision, deciding.trials, time.monotonic() - started)
    artifacts.write_json(ctx.path(ctx.stage.outs[0]), written)
    ctx.log_table("policy.json", written["units"])
    structured = rows_of(name, recipe)[1].granularity == "structured"
    drawn = figures.policy({name: decision.allocation}) if structured else None
    ctx.log_figure(drawn or figures.matrix_policy(decision.allocation), "policy.png")


def _decide(ctx: StageContext, deciding: Deciding) -> Decision:
    """The decision; a search shows every trial as it comes."""
    recipe = deciding.recipe
    planned = (recipe.trials or 0) + (recipe.first.trials if recipe.first else 0)
    if not planned:
        return deciding.decide()
    with ctx.progress(planned, f"search {deciding.name}") as bar:

        def show(number: int, trial: Looked) -> None:
            reward, perplexity = trial.reward, min(trial.perplexity, 1e9)
            ctx.log_metrics({"reward": reward, "perplexity": perplexity}, number)
            bar.update(reward=reward, perplexity=perplexity)

        deciding.on_trial = show
        return deciding.decide()


def _folder(ctx: StageContext, sparsity: float) -> Path:
    folder = ctx.checkpoint_dir / f"{sparsity:g}"
    folder.mkdir(exist_ok=True)
    return folder


def _written(decision: Decision | None, trials: list[Looked], seconds: float) -> dict[str, Any]:
    return {
        "units": decision.allocation.to_rows() if decision else [],
        "facts": decision.facts if decision else {},
        "seconds": round(seconds, 2),
        "episodes": [_episode(number, trial) for number, trial in enumerate(trials)],
        "policies": _shown(trials),
    }


def _episode(number: int, trial: Looked) -> dict[str, Any]:
    finite = bool(np.isfinite(trial.perplexity))
    return {
        "trial": number,
        "reward": trial.reward,
        "perplexity": trial.perplexity if finite else None,
        "sparsity": trial.sparsity,
    }


def _shown(trials: list[Looked]) -> dict[str, list[float]]:
    """Policies of a few trials, evenly spread, the first and the last among them."""
    if not trials:
        return {}
    chosen = sorted({round(i * (len(trials) - 1) / (_SHOWN_POLICIES - 1)) for i in range(_SHOWN_POLICIES)})
    return {str(number): [round(r, 4) for r in trials[number].retention] for number in chosen}
