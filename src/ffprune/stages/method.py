"""method: one recipe of a study: decide how much of every unit stays, prune, measure."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffprune.allocate.request import Decision, Looked
from ffprune.core.gptq import bits_per_weight, compression_ratio
from ffprune.evaluate.perplexity import perplexity
from ffprune.evaluate.speed import measure
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView
from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, calibration_windows, load, sample_windows, validation_windows
from ffprune.stages.recipes import check_onload
from ffprune.stages.record import DENSE
from ffprune.stages.search_journal import SearchJournal
from ffprune.stages.search_store import SearchStore
from ffprune.stages.sections import Recipe
from ffprune.stages.workshop import Workshop
from ffprune.stages.zero_shot import ask

_SHOWN_POLICIES = 6
"""Trials of a search whose policies are kept (SS Fig. 13)."""


def run(ctx: StageContext) -> None:
    """Decide, prune, measure; every step's seconds are kept apart."""
    name, study = ctx.stage.key, ctx.params.study
    recipe = ctx.params.methods[name]
    check_onload(name, recipe, ctx.params.compute)
    count = recipe.calibration_windows or study.calibration.windows
    key = f"methods.{name}.calibration_windows" if recipe.calibration_windows else "study.calibration.windows"
    shop = Workshop(
        name=name,
        recipe=recipe,
        study=study,
        view=ModelView(load(ctx.path(DENSE), ctx.params.compute, torch.float32)),
        calibration=calibration_windows(ctx, study.calibration.seqlen, count, key),
        validation=lambda: validation_windows(ctx, study.search.seqlen, "study.search.seqlen"),
        dtype=DTYPES[ctx.params.compute.dtype],
        trial_dtype=DTYPES[ctx.params.compute.dtype],
        seed=ctx.params.seed,
        workers=ctx.workers,
        store=lambda sparsity: SearchStore(_folder(ctx, sparsity), shop.units),
        journal=lambda: SearchJournal(_folder(ctx, recipe.sparsity)),
        on_trial=lambda number, trial: ctx.log_metrics(
            {"reward": trial.reward, "perplexity": min(trial.perplexity, 1e9)}, number
        ),
    )
    shop.check()
    before = param_count(shop.view.model)
    seconds, started = {}, time.monotonic()
    decision = shop.decide()
    seconds["decide"], started = time.monotonic() - started, time.monotonic()
    prunable = shop.view.prunable_params
    with ctx.progress(len(shop.view.blocks), f"prune {name}") as bar:
        facts = shop.compress(decision, lambda done, total: bar.advance_to(done))
    seconds["prune"] = time.monotonic() - started
    _keep(ctx, shop)
    started = time.monotonic()
    result = _sizes(shop, decision, facts, prunable, before) | _measured(ctx, shop, recipe)
    seconds["evaluate"] = time.monotonic() - started
    result = {"name": name, "label": recipe.label, "recipe": recipe.model_dump(mode="json")} | result
    result |= {
        "seconds": {step: round(spent, 2) for step, spent in seconds.items()},
        "trials": len(shop.trials),
        "policy": decision.allocation.to_rows() if decision else [],
        "episodes": [_episode(number, trial) for number, trial in enumerate(shop.trials)],
        "policies": _shown(shop.trials),
        "facts": facts | (decision.facts if decision else {}),
    }
    artifacts.write_json(ctx.path(ctx.stage.metrics[0]), result)
    _show(ctx, result, decision)


def _keep(ctx: StageContext, shop: Workshop) -> None:
    """The model, before it is converted to be measured; DVC wants the folder of every method."""
    folder = ctx.path(ctx.stage.outs[0])
    if shop.recipe.save:
        dense = ctx.path(DENSE)
        save_model(shop.view.model, load_tokenizer(dense), folder, stored_dtype(dense))
    else:
        with artifacts.atomic_dir(folder):
            pass


def _folder(ctx: StageContext, sparsity: float) -> Path:
    folder = ctx.checkpoint_dir / f"{sparsity:g}"
    folder.mkdir(exist_ok=True)
    return folder


def _sizes(
    shop: Workshop, decision: Decision | None, facts: dict[str, Any], prunable: int, before: int
) -> dict[str, Any]:
    """Weights before and after; what SliceGPT and SVD-LLM store is counted, shortcuts and factors included."""
    recipe = shop.recipe
    if decision is not None:
        removed = decision.allocation.removed
    elif recipe.compressor == "svd_llm":
        removed = facts["prunable_before"] - facts["prunable_after"]
    elif recipe.compressor == "slicegpt":
        removed = facts["decoder_before"] - facts["decoder_after"]
    else:
        removed = 0
    bits = 16.0 if recipe.quantize is None else float(recipe.quantize.bits)
    if shop.rows[1].granularity == "structured":
        after = param_count(shop.view.model)  # biases go with rows, and come with repairs
    else:
        after = facts["params_after"] if "params_after" in facts else before - removed
    return {
        "granularity": shop.rows[1].granularity,
        "sparsity": removed / prunable,
        "prunable_before": prunable,
        "prunable_after": prunable - removed,
        "params_before": before,
        "params_after": after,
        "bits_per_weight": 16.0 if recipe.quantize is None else bits_per_weight(int(bits), recipe.quantize.group_size),
        "compression": compression_ratio(bits, removed / prunable),
    }


def _measured(ctx: StageContext, shop: Workshop, recipe: Recipe) -> dict[str, Any]:
    """Perplexity on every text; zero-shot tasks and speed where the recipe asks."""
    study, compute, seed = shop.study, ctx.params.compute, ctx.params.seed
    model = shop.view.model
    model.to(dtype=DTYPES[compute.dtype])  # type: ignore[call-arg]
    texts = {}
    for text, path in study.texts.items():
        windows = sample_windows(ctx.path(DENSE), ctx.path(path), study.seqlen, study.windows, seed, "study.windows")
        found = perplexity(model, windows, study.batch_size, require_finite=recipe.compressor == "none")
        texts[text] = {
            "value": found.value if found.finite else None,
            "stderr": found.stderr,
            "windows": found.windows,
            "seqlen": found.seqlen,
            "tokens": found.tokens,
        }
    result: dict[str, Any] = {"perplexity": texts, "dtype": compute.dtype, "seed": seed, "zero_shot": {}, "speed": {}}
    if recipe.zero_shot:
        source = ctx.path(next(iter(study.texts.values())))
        result["zero_shot"] = ask(model, ctx.path(DENSE), source, study.zero_shot, seed)
    if recipe.speed:
        models = {"dense": load(ctx.path(DENSE), compute), "pruned": model}
        timing = study.speed
        speeds = measure(models, timing.prefill_tokens, timing.decode_tokens, repeats=timing.repeats, seed=seed)
        result["speed"] = {key: value for key, value in asdict(speeds["pruned"]).items() if "ratios" not in key}
    return result


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


def _show(ctx: StageContext, result: dict[str, Any], decision: Decision | None) -> None:
    """The run's page in MLflow."""
    numbers = {f"perplexity/{text}": found["value"] for text, found in result["perplexity"].items()}
    numbers |= {f"seconds/{step}": spent for step, spent in result["seconds"].items()}
    numbers |= {key: result[key] for key in ("sparsity", "params_after", "compression")}
    ctx.log_metrics({key: value for key, value in numbers.items() if value is not None})
    recipe = result["recipe"]
    ctx.set_tags(
        method=result["name"],
        sparsity=f"{recipe['sparsity']:g}",
        **{key: str(recipe[key]) for key in ("allocator", "compressor", "criterion", "repair")},
    )
    ctx.log_dict("result.json", result)
    if decision is not None:
        ctx.log_table("policy.json", decision.allocation.to_rows())
        structured_units = result["granularity"] == "structured"
        drawn = figures.policy({result["label"]: decision.allocation}) if structured_units else None
        ctx.log_figure(drawn or figures.matrix_policy(decision.allocation), "policy.png")
