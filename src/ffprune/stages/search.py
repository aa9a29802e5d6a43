"""search: find the policy at the first sparsity with PPO, rewarded by the really pruned model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ffprune.allocate.agent import PRESETS
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.guided import GuidedResult, guided, is_guided
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate
from ffprune.allocate.search import SearchResult, search
from ffprune.allocate.trace_rank import trace_rank
from ffprune.allocate.uniform import handmade
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.units import Allocation, Unit
from ffprune.models.checkpoint import read_view
from ffprune.stages import artifacts, figures
from ffprune.stages.budget import Budget, facts_of, warn_of_another_machine
from ffprune.stages.cluster import hired
from ffprune.stages.context import StageContext
from ffprune.stages.progress import Bars
from ffprune.stages.record import CURVES, DENSE, LATENCY, SEARCH_AGENT, SEARCH_EPISODES, SEARCH_POLICY, TRACES
from ffprune.stages.search_reward import search_reward
from ffprune.stages.search_store import SearchStore
from ffprune.stages.sections import ScheduleParams


@dataclass(frozen=True)
class Task:
    """What differs between the first search and a transfer.

    Attributes:
        sparsity: the target.
        episodes: trials.
        schedule: the progressive schedule, in episodes of a search of 3000.
        trained: tensors of an agent to continue; None for a new one.
    """

    sparsity: float
    episodes: int
    schedule: ScheduleParams
    trained: dict[str, Tensor] | None = None


def run(ctx: StageContext) -> None:
    """Search from the best of the policies that the sensitivity stage suggests."""
    params = ctx.params.search
    found = run_search(ctx, Task(params.sparsity, params.episodes, params.schedule))
    write_result(ctx, *found, params.sparsity, SEARCH_POLICY, SEARCH_AGENT, SEARCH_EPISODES)


def run_search(ctx: StageContext, task: Task) -> tuple[SearchResult, Budget]:
    """Set the problem up and search; what was found, and for which budget.

    Raises:
        ParameterError: the trained agent is of another kind than ``search.agent``.
        UnreachableSparsity: no policy inside the bounds has this sparsity.
    """
    params = ctx.params.search
    bounds = params.bounds()
    if task.trained is not None and is_guided(task.trained) != (params.agent == "guided"):
        raise ParameterError(
            f"search.agent {params.agent} was asked to go on with {SEARCH_AGENT}",
            "That agent is of another kind: scores of a guided one are departures from dynamic programming, those of "
            "PPO alone are the policy",
            "Run 'ffprune search' with this search.agent first (dvc repro and make run do)",
        )
    budget = Budget.on(read_view(ctx.path(DENSE), ctx.params.units.heads), facts_of(params, ctx.path(LATENCY)))
    warn_of_another_machine(budget.facts, ctx.params.compute.device)
    budget.check(task.sparsity, bounds)
    units = budget.units
    best = 0.0
    name = f"{ctx.stage.name} {task.sparsity:g}"
    with hired(partial(search_reward, ctx), ctx.workers, params) as reward, Bars(ctx.progress) as bars:
        starts = _starts(ctx, units, task.sparsity, bounds)
        problem = Problem(
            units,
            task.sparsity,
            bounds,
            params.mapping,
            params.step,
            reward,
            starts,
            partial(bars.race, f"{name}, samples of candidates"),
        )
        store = SearchStore(ctx.checkpoint_dir, units)
        # Trials of before a kill are told of again, all at once: they are no measure of what the others will take.
        resumed = len((store.load() or ((), ()))[1])
        if task.episodes:
            bars.at(name, task.episodes, resumed)

        def show(episode: Episode) -> None:
            nonlocal best
            best = max(best, episode.outcome.reward)
            shown = {
                "reward": episode.outcome.reward,
                "perplexity": min(episode.outcome.perplexity, 1e9),
                "sparsity": episode.allocation.sparsity,
            }
            done = max(resumed, episode.number + 1)
            bars.at(name, task.episodes, done - 1).advance_to(done, **shown, best=best)
            ctx.log_metrics(shown, episode.number)

        find: Callable[..., SearchResult] = partial(search, problem)
        if params.agent == "guided":
            find = partial(guided, problem, _curves(ctx), params.guide.guidance())
        preset, schedule = PRESETS[params.agent], task.schedule.scaled(max(1, task.episodes))
        found = find(preset, schedule, task.episodes, params.finalists, ctx.params.seed, store, show, task.trained)
    return found, budget


def _curves(ctx: StageContext) -> list[Any]:
    """Per unit, float64 ``[granules + 1]``: the predicted loss of keeping 0, 1, ... granules."""
    return [np.array(row["loss"]) for row in artifacts.read_json(ctx.path(CURVES))]


def _starts(ctx: StageContext, units: tuple[Unit, ...], sparsity: float, bounds: Bounds) -> dict[str, Allocation]:
    """Policies known before any search; those that the bounds do not allow are left out."""
    params = ctx.params.search
    curves = _curves(ctx)
    sensitivity = _unit_sensitivity(units, artifacts.read_json(ctx.path(TRACES)))
    makers: dict[str, Callable[[], Allocation]] = {
        "dynamic programming": partial(dynamic_programming, units, curves, sparsity, bounds, params.step),
        "trace rank": partial(trace_rank, units, sensitivity, sparsity, params.rank_half_width, bounds, params.step),
        "handmade": partial(handmade, units, sparsity, bounds),
    }
    starts = {}
    for name, make in makers.items():
        try:
            starts[name] = make()
        except UnreachableSparsity as refusal:
            ctx.set_tags(**{f"start.{name}": str(refusal)})
    return starts


def _unit_sensitivity(units: tuple[Unit, ...], traces: list[dict[str, Any]]) -> Any:
    """Average Hessian trace over the weights of each unit's matrices (MS Eq. 6), float64 ``[N]``."""
    totals = {unit.name: [0.0, 0.0] for unit in units}
    for row in traces:
        layer, _, role = row["matrix"].rpartition(".")
        total = totals[f"{layer}.{'attention' if role in 'qkvo' else 'ffn'}"]
        total[0] += row["trace"]
        total[1] += row["weights"]
    return np.array([trace / weights for trace, weights in totals.values()])


def write_result(
    ctx: StageContext, found: SearchResult, budget: Budget, sparsity: float, policy: str, agent: str, episodes: str
) -> None:
    """Write policy, agent and episodes, and show them in MLflow."""
    best = found.best
    rows = best.allocation.to_rows()
    tokens = sum(e.outcome.tokens for e in found.episodes) + sum(c.outcome.tokens for c in found.candidates)
    artifacts.write_json(
        ctx.path(policy),
        {
            "budget": budget.facts,
            "sparsity_target": sparsity,
            "sparsity": best.allocation.sparsity,
            "removed": budget.removed(best.allocation),
            "source": best.name,
            "start": found.start,
            "perplexity": best.outcome.perplexity,
            "dense_perplexity": best.outcome.dense_perplexity,
            "episodes": len(found.episodes),
            "imagined_episodes": found.imagined if isinstance(found, GuidedResult) else 0,
            "non_finite": sum(not e.outcome.finite for e in found.episodes),
            "tokens": tokens,
            "candidates": [_candidate_row(candidate) for candidate in found.candidates],
            "units": rows,
            "front": _front(found),
        },
    )
    artifacts.write_tensors(ctx.path(agent), found.agent)
    artifacts.write_csv(ctx.path(episodes), [_episode_row(episode) for episode in found.episodes], _EPISODE)
    ctx.log_metrics(
        {
            "best_perplexity": best.outcome.perplexity,
            "best_ratio": best.outcome.perplexity / best.outcome.dense_perplexity,
            "tokens": tokens,
            "non_finite": sum(not e.outcome.finite for e in found.episodes),
        }
    )
    ctx.set_tags(method="searched", sparsity=f"{sparsity:g}", budget=budget.facts["name"], source=best.name)
    ctx.log_table("policy.json", rows)
    ctx.log_table("candidates.json", [_candidate_row(candidate) for candidate in found.candidates])
    ctx.log_figure(figures.policy({f"searched {sparsity:g}": best.allocation}), "policy.png")


def _front(found: SearchResult) -> list[dict[str, Any]]:
    """Policies all over the range that the search serves, with what the model of the loss says of them."""
    if not isinstance(found, GuidedResult):
        return []
    return [
        {
            "sparsity": allocation.sparsity,
            "removed": allocation.saved,
            "predicted_loss": found.predicted[target][0],
            "predicted_stderr": found.predicted[target][1],
            "kept": allocation.kept,
        }
        for target, allocation in found.front.items()
    ]


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    outcome = candidate.outcome
    return {
        "name": candidate.name,
        "sparsity": candidate.allocation.sparsity,
        "ratio": outcome.perplexity / outcome.dense_perplexity if outcome.finite else None,
        "loss": outcome.loss if outcome.finite else None,
        "tokens": outcome.tokens,
    }


_EPISODE = ("episode", "sparsity_target", "sparsity", "samples", "reward", "loss", "perplexity", "dense_perplexity")
"""Columns of a table of trials, which a transfer may have none of."""


def _episode_row(episode: Episode) -> dict[str, Any]:
    outcome = episode.outcome
    return {
        "episode": episode.number,
        "sparsity_target": round(episode.sparsity, 6),
        "sparsity": round(episode.allocation.sparsity, 6),
        "samples": episode.samples,
        "reward": outcome.reward,
        "loss": outcome.loss if outcome.finite else "",
        "perplexity": outcome.perplexity if outcome.finite else "",
        "dense_perplexity": outcome.dense_perplexity,
    }
