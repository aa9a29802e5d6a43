"""Deciding on one model: what a recipe's allocator wants to know, and the reward of its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ffprune.allocate.besa import learn_rates
from ffprune.allocate.journal import Journal, NoJournal, Replayed
from ffprune.allocate.problem import Problem, Reward, Standing
from ffprune.allocate.request import Allocator, Decision, Evidence, Looked, Need, Request
from ffprune.allocate.search import Store
from ffprune.compress import structured, unstructured
from ffprune.compress.cut import rank_unit, reads_whole_gram
from ffprune.compress.experts import check_experts
from ffprune.compress.levels import Levels
from ffprune.compress.table import Compressor
from ffprune.core.budget import check_reachable
from ffprune.core.gram import Gram
from ffprune.core.importance import Ranking
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.saliency import SALIENCIES
from ffprune.core.units import Allocation, Unit
from ffprune.evaluate.reward import ModelReward
from ffprune.models.calibration import Calibration
from ffprune.models.masked_block import prune_in_turn
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView
from ffprune.stages import evidence
from ffprune.stages.cluster import check_installed, hired
from ffprune.stages.recipes import rows_of
from ffprune.stages.reward import trial_reward
from ffprune.stages.sections import Recipe, Study, Workers


@dataclass
class Deciding:
    """A recipe's allocator with all that it works on; no paths, so that a benchmark can bring its own text.

    Attributes:
        name: of the recipe, for messages.
        recipe: the entry of ``methods``.
        study: what all recipes share.
        view: the dense model in float32; it does not change.
        calibration: text to calibrate on, and how.
        validation: gives int64 ``[n, seqlen]`` windows of a search's reward.
        trial_dtype: of a search's forward passes.
        seed: of everything random.
        workers: how many processes try a search's policies.
        store: where the search at a sparsity keeps its state.
        journal: where a search that goes on by replay keeps its rewards.
        on_trial: told of every trial.
        on_race: told how far a race of candidates is.
        trials: every trial so far.
    """

    name: str
    recipe: Recipe
    study: Study
    view: ModelView
    calibration: Calibration
    validation: Callable[[], Tensor]
    trial_dtype: torch.dtype
    seed: int
    workers: Workers
    store: Callable[[float], Store]
    journal: Callable[[], Journal] = NoJournal
    on_trial: Callable[[int, Looked], None] = lambda number, trial: None
    on_race: Callable[[Standing], None] = lambda standing: None
    trials: list[Looked] = field(default_factory=list)
    _rankings: list[Ranking] = field(default_factory=list)

    @cached_property
    def rows(self) -> tuple[Allocator, Compressor]:
        """The allocator and the compressor; refuses what does not go together."""
        return rows_of(self.name, self.recipe)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that the compressor removes granules of."""
        return self.view.units if self.rows[1].granularity == "structured" else self.view.weight_units

    def check(self) -> None:
        """Refuse a sparsity out of reach, workers that cannot be hired and what experts cannot have, before any work.

        Raises:
            FfpruneError: see :func:`ffprune.core.budget.check_reachable`,
                :func:`ffprune.stages.cluster.check_installed` and :func:`ffprune.compress.experts.check_experts`.
        """
        recipe = self.recipe
        check_experts(self.view, f"methods.{self.name}", recipe.compressor, recipe.repair, recipe.quantize is not None)
        if self.rows[0].searches:
            check_installed(self.workers)
        for sparsity in (self.recipe.sparsity, *([self.recipe.first.sparsity] if self.recipe.first else [])):
            check_reachable(self.units, sparsity, self.study.bounds())

    def decide(self) -> Decision:
        """How much of every unit stays."""
        allocator = self.rows[0]
        if not allocator.searches:
            return allocator.decide(self._request(_no_reward))
        made = self._reward()
        # Workers are sent the reward as it is: to make it anew they would need the text, and the time, of calibration.
        with hired(lambda: made, self.workers, self.study.search) as reward:
            return allocator.decide(self._request(Replayed(reward, self.journal()) if allocator.replays else reward))

    def _request(self, reward: Reward) -> Request:
        recipe, search, allocator = self.recipe, self.study.search, self.rows[0]
        return Request(
            problem=Problem(
                self.units,
                recipe.sparsity,
                self.study.bounds(),
                allocator.mapping,
                search.step,
                reward,
                on_race=self.on_race,
            ),
            evidence=self._evidence(),
            half_width=self.study.owl_half_width if recipe.allocator == "owl" else self.study.rank_half_width,
            trials=recipe.trials or 0,
            first=(recipe.first.sparsity, recipe.first.trials) if recipe.first else None,
            schedule=search.schedule.printed(),
            finalists=search.finalists,
            seed=self.seed,
            store=self.store,
            on_trial=self._note,
        )

    def _note(self, trial: Looked) -> None:
        self.on_trial(len(self.trials), trial)
        self.trials.append(trial)

    def _evidence(self) -> Evidence:
        """What the allocator needs to know of the dense model."""
        study, given = self.study, (self.view, self.calibration)
        measures: dict[Need, Callable[[], Any]] = {
            "outliers": lambda: evidence.outlier_shares(*given, study.owl_multiple),
            "granule_scores": lambda: evidence.granule_scores(*given),
            "sensitivity": lambda: evidence.sensitivity(
                self.view, self.calibration.windows, study.hutchinson, self.seed
            ),
            "curves": self._curves,
            "block_rates": self._block_rates,
        }
        return Evidence(**{need: measures[need]() for need in self.rows[0].needs if need != "reward"})

    def _curves(self) -> list[evidence.Floats]:
        study, view, text, criterion = self.study, self.view, self.calibration, self.recipe.criterion
        if self.rows[1].granularity == "structured":
            return evidence.unit_curves(view, self._ranked(self._last_grams()), text.windows, study.fisher, self.seed)
        assert criterion is not None
        return evidence.matrix_curves(view, text, criterion, study.damping, study.fisher, self.seed)

    def _last_grams(self) -> Iterator[Gram]:
        """The dense model's, of every unit's last map, with as much as ranking and repairing need."""
        whole = reads_whole_gram(self.recipe.criterion, self.recipe.repair)
        return evidence.last_grams(self.view, self.calibration, whole)

    def _ranked(self, grams: Iterable[Gram]) -> list[Ranking]:
        """Every unit's granules, ranked once for trials and curves, by the Grams of last maps that come first."""
        assert self.recipe.criterion is not None
        if not self._rankings:
            self._rankings = [
                rank_unit(self.recipe.criterion, self.view.unit_linears(index), gram, self.study.damping)
                for index, gram in enumerate(grams)
            ]
        return self._rankings

    def _block_rates(self) -> dict[str, float]:
        def learn(ranks: Any, errors: Any) -> dict[str, float]:
            return learn_rates(ranks, errors, self.recipe.sparsity).rates

        # A step a window, as in the published code.
        return prune_in_turn(self.view, self.calibration.windows, 1, learn, self.calibration.progress)

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
            last = list(self._last_grams())
            orders = [ranking.order for ranking in self._ranked(last)]
            repaired = [xx for gram in last if (xx := gram.xx) is not None] if recipe.repair in _BY_RIDGE else None
            levels = Levels(view, orders, repaired, study.damping) if repaired else None
            plan = structured.prepare(view, orders, levels, self.trial_dtype)
        else:
            full = None if SALIENCIES[recipe.criterion].needs_inverse else ()
            layers = enumerate(self.calibration.grams(self.view, full))
            grams = {f"layers.{i}.{role}": gram for i, layer in layers for role, gram in layer.items()}
            plan = unstructured.prepare(view, grams, recipe.criterion, study.damping, self.trial_dtype)
        return trial_reward(plan, self.units, self.validation(), allocator.reward, study.search, self.seed)


_BY_RIDGE = ("ridge", "mean+ridge", "stream")
"""Repairs that plain ridge stands for in a trial."""


class _NoReward:
    """For allocators that make no trials."""

    most_samples = fixed = 0

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        raise AssertionError("an allocator that asks no reward was given one")


_no_reward: Reward = _NoReward()
