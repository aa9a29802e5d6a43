"""method: one recipe of a study: decide how much of every unit stays, prune, measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffprune.allocate.besa import learn_rates
from ffprune.allocate.journal import Journal, NoJournal, Replayed
from ffprune.allocate.problem import Problem, Reward
from ffprune.allocate.search import Store
from ffprune.allocate.table import Allocator, Decision, Evidence, Looked, Need, Request
from ffprune.compress import slicegpt, structured, svd_llm, unstructured
from ffprune.compress.cut import cut, order_of
from ffprune.compress.follow import follow
from ffprune.compress.levels import Levels
from ffprune.compress.table import Compressor
from ffprune.compress.unstructured import Quantisation, WeightPruning
from ffprune.core.budget import check_reachable
from ffprune.core.gptq import bits_per_weight, compression_ratio
from ffprune.core.outcome import Outcome
from ffprune.core.saliency import SALIENCIES
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation, Unit
from ffprune.evaluate.perplexity import perplexity
from ffprune.evaluate.reward import ModelReward
from ffprune.evaluate.speed import measure
from ffprune.models.masked_block import prune_in_turn
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView
from ffprune.models.walk import collect
from ffprune.stages import artifacts, evidence, figures
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, calibration_windows, last_map, load, sample_windows
from ffprune.stages.recipes import rows_of
from ffprune.stages.record import DENSE, VALIDATION
from ffprune.stages.search_journal import SearchJournal
from ffprune.stages.search_store import SearchStore
from ffprune.stages.sections import Recipe, Study
from ffprune.stages.zero_shot import ask

_SHOWN_POLICIES = 6
"""Trials of a search whose policies are kept (SS Fig. 13)."""


@dataclass
class Workshop:
    """A recipe with all that it works on; no paths, so that a benchmark can bring its own text.

    Attributes:
        name: of the recipe, for messages.
        recipe: the entry of ``methods``.
        study: what all recipes share.
        view: the dense model in float32; it is pruned in place.
        calibration: int64 ``[n, seqlen]`` windows.
        validation: gives int64 ``[n, seqlen]`` windows of a search's reward.
        dtype: of a search's forward passes.
        seed: of everything random.
        store: where the search at a sparsity keeps its state.
        journal: where a search that goes on by replay keeps its rewards.
        on_trial: told of every trial.
        trials: every trial so far.
    """

    name: str
    recipe: Recipe
    study: Study
    view: ModelView
    calibration: Tensor
    validation: Callable[[], Tensor]
    dtype: torch.dtype
    seed: int
    store: Callable[[float], Store]
    journal: Callable[[], Journal] = NoJournal
    on_trial: Callable[[int, Looked], None] = lambda number, trial: None
    trials: list[Looked] = field(default_factory=list)

    @cached_property
    def rows(self) -> tuple[Allocator, Compressor]:
        """The allocator and the compressor; refuses what does not go together."""
        return rows_of(self.name, self.recipe)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that the compressor removes granules of."""
        return self.view.units if self.rows[1].granularity == "structured" else self.view.weight_units

    @property
    def _batch(self) -> int:
        return self.study.calibration.batch_size

    def check(self) -> None:
        """Refuse what this model cannot do, before any work.

        Raises:
            FfpruneError: see :func:`rows_of`; a sparsity out of reach; a family that a compressor does not know.
        """
        _, compressor = self.rows
        if self.recipe.compressor == "slicegpt":
            slicegpt.check(self.view)
            slicegpt.dimensions(self.view.model.config.hidden_size, self.recipe.sparsity)
        if compressor.granularity in ("structured", "unstructured"):
            for sparsity in (self.recipe.sparsity, *([self.recipe.first.sparsity] if self.recipe.first else [])):
                check_reachable(self.units, sparsity, self.study.bounds())

    def decide(self) -> Decision | None:
        """How much of every unit stays; None where the compressor has no units."""
        allocator, compressor = self.rows
        if compressor.granularity not in ("structured", "unstructured"):
            return None
        recipe, search = self.recipe, self.study.search
        bounds = self.study.bounds()
        reward: Reward = self._reward() if allocator.searches else _no_reward
        reward = Replayed(reward, self.journal()) if allocator.replays else reward
        problem = Problem(self.units, recipe.sparsity, bounds, allocator.mapping, search.step, reward)
        schedule = search.schedule
        request = Request(
            problem=problem,
            evidence=self._evidence(),
            half_width=self.study.owl_half_width if recipe.allocator == "owl" else self.study.rank_half_width,
            trials=recipe.trials or 0,
            first=(recipe.first.sparsity, recipe.first.trials) if recipe.first else None,
            schedule=Schedule(schedule.alpha_start, schedule.k, schedule.t0),
            finalists=search.finalists,
            seed=self.seed,
            store=self.store,
            on_trial=self._note,
        )
        return allocator.decide(request)

    def compress(self, decision: Decision | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Prune the view's model; facts about how it went."""
        recipe, study = self.recipe, self.study
        if recipe.compressor == "slicegpt":
            width = slicegpt.dimensions(self.view.model.config.hidden_size, recipe.sparsity)
            return asdict(slicegpt.compress(self.view, width, self.calibration, self._batch, progress))
        if recipe.compressor == "svd_llm":
            grams = svd_llm.dense_grams(self.view, self.calibration, self._batch)
            found = svd_llm.compress(self.view, recipe.sparsity, grams, progress)
            damped = sum(matrix.damping > 0 for matrix in found.matrices)
            return {key: value for key, value in asdict(found).items() if key != "matrices"} | {"damped": damped}
        dense_inputs = recipe.inputs == "dense"
        if recipe.compressor == "slice":
            assert decision is not None
            assert recipe.criterion is not None
            if recipe.repair == "stream":
                dampings = follow(
                    self.view,
                    decision.allocation,
                    self.calibration,
                    self._batch,
                    recipe.criterion,
                    study.damping,
                    progress=progress,
                )
                return {"dampings": dampings}
            cut(
                self.view,
                decision.allocation,
                self.calibration,
                self._batch,
                recipe.criterion,
                recipe.repair or "none",
                study.damping,
                dense_inputs,
                progress,
            )
            return {}
        if recipe.compressor == "none" and recipe.quantize is None:
            return {}
        how = WeightPruning(
            criterion=recipe.criterion or "magnitude",
            reconstruct=recipe.compressor == "sparsegpt",
            pattern=recipe.pattern,
            quantisation=Quantisation(**recipe.quantize.model_dump()) if recipe.quantize else None,
            damping=study.damping,
        )
        allocation = decision.allocation if decision else Allocation.dense(self.view.weight_units)
        matrices = unstructured.prune(self.view, allocation, self.calibration, self._batch, how, dense_inputs, progress)
        raised = {matrix.name: matrix.damping for matrix in matrices if matrix.damping > study.damping}
        return {"raised_damping": raised}

    def _note(self, trial: Looked) -> None:
        self.on_trial(len(self.trials), trial)
        self.trials.append(trial)

    def _evidence(self) -> Evidence:
        """What the allocator needs to know of the dense model."""
        study, view, windows = self.study, self.view, self.calibration
        measures: dict[Need, Callable[[], Any]] = {
            "outliers": lambda: evidence.outlier_shares(view, windows, self._batch, study.owl_multiple),
            "granule_scores": lambda: evidence.granule_scores(view, windows, self._batch),
            "sensitivity": lambda: evidence.sensitivity(view, windows, study.hutchinson, self.seed),
            "curves": self._curves,
            "block_rates": self._block_rates,
        }
        return Evidence(**{need: measures[need]() for need in self.rows[0].needs if need != "reward"})

    def _curves(self) -> list[evidence.Floats]:
        assert self.recipe.criterion is not None
        structured_units = self.rows[1].granularity == "structured"
        curves = evidence.unit_curves if structured_units else evidence.matrix_curves
        return curves(
            self.view,
            self.calibration,
            self._batch,
            self.recipe.criterion,
            self.study.damping,
            self.study.fisher,
            self.seed,
        )

    def _block_rates(self) -> dict[str, float]:
        def learn(ranks: Any, errors: Any) -> dict[str, float]:
            return learn_rates(ranks, errors, self.recipe.sparsity).rates

        # A step a window, as in the published code.
        return prune_in_turn(self.view, self.calibration, 1, learn)

    def _reward(self) -> ModelReward:
        """Perplexity of the really pruned model, a copy that trials are set on.

        Its cuts are repaired by plain ridge, whose factorisation serves every trial, or not at all.
        """
        allocator, compressor = self.rows
        recipe, study = self.recipe, self.study
        assert recipe.criterion is not None
        view = ModelView(copy_model(self.view.model))
        plan: structured.Plan | unstructured.MaskPlan
        if compressor.granularity == "structured":
            full = [last_map(view, index) for index in range(len(view.units))]
            grams = collect(view, self.calibration, full, self._batch)
            last = [grams[name] for name in full]
            orders = [
                order_of(recipe.criterion, view.unit_linears(i), gram, study.damping) for i, gram in enumerate(last)
            ]
            repaired = [xx for gram in last if (xx := gram.xx) is not None] if recipe.repair in _BY_RIDGE else None
            levels = Levels(view, orders, repaired, study.damping) if repaired else None
            plan = structured.prepare(view, orders, levels, self.dtype)
        else:
            full = list(view.prunable) if SALIENCIES[recipe.criterion].needs_inverse else []
            grams = collect(view, self.calibration, full, self._batch)
            plan = unstructured.prepare(view, grams, recipe.criterion, study.damping, self.dtype)
        return ModelReward(
            model=view.model,
            apply=plan.apply,
            dense=Allocation.dense(self.units),
            windows=self.validation(),
            kind=allocator.reward,
            trial_samples=study.search.samples,
            fixed=study.search.final_samples,
            batch_size=study.search.batch_size,
            seed=self.seed,
        )


_BY_RIDGE = ("ridge", "mean+ridge", "stream")
"""Repairs that plain ridge stands for in a trial."""


class _NoReward:
    """For allocators that make no trials."""

    most_samples = 0

    def __call__(self, allocation: Allocation, samples: int, draw: int | None) -> Outcome:
        raise AssertionError("an allocator that asks no reward was given one")


_no_reward: Reward = _NoReward()


def run(ctx: StageContext) -> None:
    """Decide, prune, measure; every step's seconds are kept apart."""
    name, study = ctx.stage.key, ctx.params.study
    recipe = ctx.params.methods[name]
    rows_of(name, recipe)
    count = recipe.calibration_windows or study.calibration.windows
    key = f"methods.{name}.calibration_windows" if recipe.calibration_windows else "study.calibration.windows"
    shop = Workshop(
        name=name,
        recipe=recipe,
        study=study,
        view=ModelView(load(ctx.path(DENSE), ctx.params.compute, torch.float32)),
        calibration=calibration_windows(ctx, study.calibration.seqlen, count, key),
        validation=lambda: sample_windows(
            ctx.path(DENSE), ctx.path(VALIDATION), study.search.seqlen, 0, ctx.params.seed, "study.search.seqlen"
        ),
        dtype=DTYPES[ctx.params.compute.dtype],
        seed=ctx.params.seed,
        store=lambda sparsity: SearchStore(_folder(ctx, sparsity), shop.units),
        journal=lambda: SearchJournal(_folder(ctx, recipe.sparsity)),
        on_trial=lambda number, trial: ctx.log_metrics(
            {"reward": trial.reward, "perplexity": min(trial.perplexity, 1e9)}, number
        ),
    )
    shop.check()
    before = sum(parameter.numel() for parameter in shop.view.model.parameters())
    seconds, started = {}, time.monotonic()
    decision = shop.decide()
    seconds["decide"], started = time.monotonic() - started, time.monotonic()
    prunable = shop.view.prunable_params
    with ctx.progress(len(shop.view.blocks), f"prune {name}") as bar:
        facts = shop.compress(decision, lambda done, total: bar.advance_to(done))
    seconds["prune"], started = time.monotonic() - started, time.monotonic()
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
