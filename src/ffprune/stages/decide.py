"""decide: for one recipe of a study, how much of every unit stays.

A stage of its own, so that a search is not made again when the cut that follows it, a text or a task changes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffprune.allocate.problem import Standing
from ffprune.allocate.request import Decision, Looked
from ffprune.models.view import ModelView
from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.deciding import Deciding
from ffprune.stages.inputs import DTYPES, load, recipe_calibration, validation_windows
from ffprune.stages.progress import Bars
from ffprune.stages.recipes import check_onload
from ffprune.stages.record import dense_model
from ffprune.stages.search_journal import SearchJournal
from ffprune.stages.search_store import SearchStore

_SHOWN_POLICIES = 6
"""Trials of a search whose policies are kept (SS Fig. 13)."""


def run(ctx: StageContext) -> None:
    """Decide; a compressor without units gets a decision without any."""
    name = ctx.stage.key
    recipe = ctx.params.methods[name]
    _, compressor = check_onload(name, recipe, ctx.params.compute)
    if not compressor.has_units:
        artifacts.write_json(ctx.path(ctx.stage.outs[0]), _written(None, [], 0.0))
        return
    study, model = ctx.params.study, dense_model(recipe.model)
    trials = (recipe.trials or 0) + (recipe.first.trials if recipe.first else 0)
    bars = _Bars(ctx, name, trials)
    deciding = Deciding(
        name=name,
        recipe=recipe,
        study=study,
        view=ModelView(load(ctx.path(model), ctx.params.compute, torch.float32)),
        calibration=recipe_calibration(ctx, name, recipe, bars.layer),
        validation=lambda: validation_windows(ctx, study.search.seqlen, "study.search.seqlen", model),
        trial_dtype=DTYPES[ctx.params.compute.dtype],
        seed=ctx.params.seed,
        workers=ctx.workers,
        store=lambda sparsity: SearchStore(_folder(ctx, sparsity), deciding.units),
        journal=lambda: SearchJournal(_folder(ctx, recipe.sparsity)),
        on_trial=bars.trial,
        on_race=bars.candidates,
    )
    deciding.check()
    started = time.monotonic()
    with bars:
        decision = deciding.decide()
    written = _written(decision, deciding.trials, time.monotonic() - started)
    artifacts.write_json(ctx.path(ctx.stage.outs[0]), written)
    ctx.log_table("policy.json", written["units"])
    structured = compressor.granularity == "structured"
    drawn = figures.policy({name: decision.allocation}) if structured else figures.matrix_policy(decision.allocation)
    ctx.log_figure(drawn, "policy.png")


class _Bars(Bars):
    """Progress of a decision: layers, whenever it calibrates; trials and races of candidates, if it searches."""

    def __init__(self, ctx: StageContext, name: str, trials: int) -> None:
        super().__init__(ctx.progress)
        self._ctx, self._name, self._trials = ctx, name, trials

    def layer(self, done: int, total: int) -> None:
        """A layer was calibrated."""
        self.at(f"calibrate {self._name}", total, anew=done == 1).advance_to(done)

    def trial(self, number: int, trial: Looked) -> None:
        """A policy was tried."""
        reward, perplexity = trial.reward, min(trial.perplexity, 1e9)
        self._ctx.log_metrics({"reward": reward, "perplexity": perplexity}, number)
        self.at(f"search {self._name}", self._trials, number).update(reward=reward, perplexity=perplexity)

    def candidates(self, standing: Standing) -> None:
        """Policies are compared."""
        self.race(f"search {self._name}, samples of candidates", standing)


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
