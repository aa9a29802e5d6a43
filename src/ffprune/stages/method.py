"""method: one recipe of a study, as it was decided: prune, measure."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from ffprune.compress.table import COMPRESSORS
from ffprune.core.gptq import bits_per_weight, compression_ratio
from ffprune.core.units import Allocation
from ffprune.evaluate.perplexity import perplexity
from ffprune.evaluate.speed import measure
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.compressing import check_model, check_save, compress
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, load, recipe_calibration, sample_windows
from ffprune.stages.policies import read_policy
from ffprune.stages.progress import Bars
from ffprune.stages.record import DECIDE, dense_model
from ffprune.stages.sections import Recipe
from ffprune.stages.zero_shot import ask


def run(ctx: StageContext) -> None:
    """Prune and measure; every step's seconds are kept apart."""
    name, study = ctx.stage.key, ctx.params.study
    recipe = ctx.params.methods[name]
    check_save(name, recipe)
    policy, decided = read_policy(ctx.path(DECIDE.of(name).outs[0]))
    allocation = policy if decided["units"] else None
    view = ModelView(load(ctx.path(dense_model(recipe.model)), ctx.params.compute, torch.float32))
    check_model(name, recipe, view)
    before, prunable = param_count(view.model), view.prunable_params
    seconds, started = {"decide": decided["seconds"]}, time.monotonic()
    with ctx.progress(len(view.blocks), f"prune {name}") as bar:
        calibration = recipe_calibration(ctx, name, recipe, lambda done, total: bar.advance_to(done))
        facts = compress(recipe, study, view, calibration, allocation)
    seconds["prune"] = time.monotonic() - started
    _keep(ctx, recipe, view)
    started = time.monotonic()
    result = _sizes(recipe, view, allocation, facts, prunable, before) | _measured(ctx, recipe, view)
    seconds["evaluate"] = time.monotonic() - started
    result = {"name": name, "label": recipe.label, "recipe": recipe.model_dump(mode="json")} | result
    result |= {
        "seconds": {step: round(spent, 2) for step, spent in seconds.items()},
        "trials": len(decided["episodes"]),
        "policy": decided["units"],
        "episodes": decided["episodes"],
        "policies": decided["policies"],
        "facts": facts | decided["facts"],
    }
    artifacts.write_json(ctx.path(ctx.stage.metrics[0]), result)
    _show(ctx, result)


def _keep(ctx: StageContext, recipe: Recipe, view: ModelView) -> None:
    """The model, before it is converted to be measured; DVC wants the folder of every method."""
    folder = ctx.path(ctx.stage.outs[0])
    if recipe.save:
        dense = ctx.path(dense_model(recipe.model))
        save_model(view.model, load_tokenizer(dense), folder, stored_dtype(dense))
    else:
        with artifacts.atomic_dir(folder):
            pass


def _sizes(
    recipe: Recipe, view: ModelView, allocation: Allocation | None, facts: dict[str, Any], prunable: int, before: int
) -> dict[str, Any]:
    """Weights before and after; what SliceGPT and SVD-LLM store is counted, shortcuts and factors included."""
    granularity = COMPRESSORS[recipe.compressor].granularity
    if allocation is not None:
        removed = allocation.removed
    elif recipe.compressor == "svd_llm":
        removed = facts["prunable_before"] - facts["prunable_after"]
    elif recipe.compressor == "slicegpt":
        removed = facts["decoder_before"] - facts["decoder_after"]
    else:
        removed = 0
    bits = 16.0 if recipe.quantize is None else float(recipe.quantize.bits)
    if granularity == "structured":
        after = param_count(view.model)  # biases go with rows, and come with repairs
    else:
        after = facts["params_after"] if "params_after" in facts else before - removed
    return {
        "granularity": granularity,
        "sparsity": removed / prunable,
        "prunable_before": prunable,
        "prunable_after": prunable - removed,
        "params_before": before,
        "params_after": after,
        "bits_per_weight": 16.0 if recipe.quantize is None else bits_per_weight(int(bits), recipe.quantize.group_size),
        "compression": compression_ratio(bits, removed / prunable),
    }


def _measured(ctx: StageContext, recipe: Recipe, view: ModelView) -> dict[str, Any]:
    """Perplexity on every text; zero-shot tasks and speed where the recipe asks."""
    study, compute, seed = ctx.params.study, ctx.params.compute, ctx.params.seed
    model, dense = view.model, ctx.path(dense_model(recipe.model))
    model.to(dtype=DTYPES[compute.dtype])  # type: ignore[call-arg]
    with Bars(ctx.progress) as bars:
        texts = {text: _perplexity(ctx, recipe, model, text, bars) for text in study.texts}
        result = {"perplexity": texts, "dtype": compute.dtype, "seed": seed, "zero_shot": {}, "speed": {}}
        if recipe.zero_shot:
            source = ctx.path(next(iter(study.texts.values())))
            told = bars.steps(f"zero-shot {ctx.stage.key}, requests")
            result["zero_shot"] = ask(model, dense, source, study.zero_shot, seed, told)
        if recipe.speed:
            models, timing = {"dense": load(dense, compute), "pruned": model}, study.speed
            speeds = measure(
                models,
                timing.prefill_tokens,
                timing.decode_tokens,
                repeats=timing.repeats,
                seed=seed,
                progress=bars.steps(f"speed {ctx.stage.key}, turns"),
            )
            result["speed"] = {key: value for key, value in asdict(speeds["pruned"]).items() if "ratios" not in key}
    return result


def _perplexity(ctx: StageContext, recipe: Recipe, model: PreTrainedModel, text: str, bars: Bars) -> dict[str, Any]:
    """On one of ``study.texts``, with its uncertainty and what was read."""
    study = ctx.params.study
    windows = sample_windows(
        ctx.path(dense_model(recipe.model)),
        ctx.path(study.texts[text]),
        study.seqlen,
        study.windows,
        ctx.params.seed,
        "study.windows",
    )
    told = bars.steps(f"perplexity {ctx.stage.key} on {text}, windows", len(windows))
    found = perplexity(model, windows, study.batch_size, told, require_finite=recipe.compressor == "none")
    return {
        "value": found.value if found.finite else None,
        "stderr": found.stderr,
        "windows": found.windows,
        "seqlen": found.seqlen,
        "tokens": found.tokens,
    }


def _show(ctx: StageContext, result: dict[str, Any]) -> None:
    """The run's page in MLflow; the policy and its figure are on the page of the stage that decided."""
    numbers = {f"perplexity/{text}": found["value"] for text, found in result["perplexity"].items()}
    numbers |= {f"seconds/{step}": spent for step, spent in result["seconds"].items()}
    numbers |= {key: result[key] for key in ("sparsity", "params_after", "compression")}
    ctx.log_metrics({key: value for key, value in numbers.items() if value is not None})
    recipe = result["recipe"]
    ctx.set_tags(
        method=result["name"],
        dense=recipe["model"],  # the tag `model` is what its source calls it
        sparsity=f"{recipe['sparsity']:g}",
        **{key: str(recipe[key]) for key in ("allocator", "compressor", "criterion", "repair")},
    )
    ctx.log_dict("result.json", result)
