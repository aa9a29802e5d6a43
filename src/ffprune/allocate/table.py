"""Every allocator by name, and how it is asked (:mod:`ffprune.allocate.request`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ffprune.allocate.agent import PRESETS
from ffprune.allocate.besa import besa
from ffprune.allocate.dynamic import coin, dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.evolution import Evolution, eas
from ffprune.allocate.evopress import EvoPress, evopress
from ffprune.allocate.flap import global_threshold
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.guided import guided
from ffprune.allocate.multi_step import amc
from ffprune.allocate.owl import owl
from ffprune.allocate.race import Candidate
from ffprune.allocate.request import Allocator, Decision, Granularity, Looked, Request
from ffprune.allocate.search import SearchResult, search
from ffprune.allocate.trace_rank import trace_rank
from ffprune.allocate.trials import Evolved, Trial
from ffprune.allocate.uniform import handmade, uniform
from ffprune.core.errors import UnreachableSparsity
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation


def _uniform(request: Request) -> Decision:
    problem = request.problem
    return Decision(uniform(problem.units, problem.sparsity, problem.bounds))


def _handmade(request: Request) -> Decision:
    problem = request.problem
    return Decision(handmade(problem.units, problem.sparsity, problem.bounds))


def _owl(request: Request) -> Decision:
    problem, outliers = request.problem, request.evidence.outliers
    assert outliers is not None
    return Decision(owl(problem.units, outliers, problem.sparsity, request.half_width, problem.bounds))


def _flap(request: Request) -> Decision:
    problem, scores = request.problem, request.evidence.granule_scores
    assert scores is not None
    return Decision(global_threshold(problem.units, scores, problem.sparsity, problem.bounds))


def _trace_rank(by_layer: bool) -> Callable[[Request], Decision]:
    def decide(request: Request) -> Decision:
        problem, known = request.problem, request.evidence.sensitivity
        assert known is not None
        width = request.half_width
        return Decision(
            trace_rank(problem.units, known, problem.sparsity, width, problem.bounds, problem.step, by_layer)
        )

    return decide


def _dynamic(request: Request) -> Decision:
    problem, curves = request.problem, request.evidence.curves
    assert curves is not None
    step = coin(problem.units, problem.step)
    return Decision(dynamic_programming(problem.units, curves, problem.sparsity, problem.bounds, step))


def _besa(request: Request) -> Decision:
    problem, rates = request.problem, request.evidence.block_rates
    assert rates is not None
    return Decision(besa(problem.units, rates, problem.sparsity, problem.bounds))


def _agent(preset: str, starts: bool) -> Callable[[Request], Decision]:
    def decide(request: Request) -> Decision:
        trained = None
        facts: dict[str, object] = {}
        # A transfer trains at the first sparsity before, and continues with that agent (FF 2.2).
        stages = [*([request.first] if request.first else []), (request.problem.sparsity, request.trials)]
        for sparsity, trials in stages:
            problem = replace(request.problem, sparsity=sparsity)
            if starts:
                problem = replace(problem, starts=_starts(replace(request, problem=problem)))
            # A trained agent needs no curriculum.
            shape = request.schedule if trained is None else replace(request.schedule, alpha_start=1.0)
            schedule = Schedule.scaled(shape.alpha_start, shape.k, shape.t0, episodes=trials)
            rest = (
                PRESETS[preset],
                schedule,
                trials,
                request.finalists,
                request.seed,
                request.store(sparsity),
                lambda episode: request.on_trial(_looked(episode)),
                trained,
            )
            if preset == "guided":
                assert request.evidence.curves is not None
                guidance = Guidance.around([asked for asked, _ in stages])
                found: SearchResult = guided(problem, request.evidence.curves, guidance, *rest)
            else:
                found = search(problem, *rest)
            trained = found.agent
            facts[f"candidates at {sparsity:g}"] = _ratios(found.candidates)
        return Decision(found.best.allocation, facts)

    return decide


def _starts(request: Request) -> dict[str, Allocation]:
    """Policies known before a search; those that the bounds do not allow are left out."""
    rows = {"dynamic programming": _dynamic, "uniform": _uniform}
    if request.problem.units[0].kind != "weight":
        rows["handmade"] = _handmade
    starts = {}
    for name, decide in rows.items():
        try:
            starts[name] = decide(request).allocation
        except UnreachableSparsity:
            continue
    return starts


def _amc(request: Request) -> Decision:
    found = amc(
        request.problem,
        PRESETS["sparsitysolver"],
        request.trials,
        request.finalists,
        request.seed,
        lambda episode: request.on_trial(_looked(episode)),
    )
    return Decision(found.best.allocation, {"candidates": _ratios(found.candidates)})


def _eas(request: Request) -> Decision:
    # The published 50 policies a generation, or at least four generations of what is asked.
    size = max(2, min(50, request.trials // 4))
    settings = Evolution(size, max(1, size // 5), size // 2, size - size // 2)
    problem = replace(request.problem, starts={"uniform": _uniform(request).allocation})
    return _evolved(
        eas(problem, settings, request.trials, request.seed, lambda trial: request.on_trial(_looked(trial)))
    )


_SMALL_EVOPRESS = EvoPress(8, (2, 1), (1 / 2, 1.0), 1 / 2)
"""Few offspring and larger levels go further with few trials."""


def _evopress(request: Request) -> Decision:
    # The published settings where they get twenty generations.
    published = EvoPress()
    settings = published if request.trials >= 20 * published.trials_per_generation else _SMALL_EVOPRESS
    problem = replace(request.problem, starts={"uniform": _uniform(request).allocation})
    return _evolved(
        evopress(problem, settings, request.trials, request.seed, lambda trial: request.on_trial(_looked(trial)))
    )


def _evolved(found: Evolved) -> Decision:
    facts: dict[str, object] = {"candidates": _ratios(found.candidates), "samples": found.samples}
    return Decision(found.best.allocation, facts)


def _looked(trial: Episode | Trial) -> Looked:
    outcome = trial.outcome
    return Looked(outcome.reward, outcome.perplexity, trial.allocation.sparsity, trial.allocation.retention)


def _ratios(candidates: Sequence[Candidate]) -> dict[str, float | None]:
    """Perplexity over the dense model's, by the candidate's name; None when it is not finite.

    Of those that read as much text as the winner: others do not compare.
    """
    most = candidates[0].outcome.tokens
    candidates = [candidate for candidate in candidates if candidate.outcome.tokens == most]
    return {c.name: c.outcome.perplexity / c.outcome.dense_perplexity if c.outcome.finite else None for c in candidates}


_STRUCTURED: tuple[Granularity, ...] = ("structured",)
_UNSTRUCTURED: tuple[Granularity, ...] = ("unstructured",)

ALLOCATORS: dict[str, Allocator] = {
    "uniform": Allocator(_uniform, "-", "the same share everywhere"),
    "handmade": Allocator(_handmade, "ffprune", "inner FFNs only, equal shares", _STRUCTURED),
    "owl": Allocator(_owl, "Yin et al. 2023", "OWL, section 3.2", _UNSTRUCTURED, ("outliers",)),
    "flap": Allocator(_flap, "An et al. 2024", "FLAP, adaptive structure search", _STRUCTURED, ("granule_scores",)),
    "trace_rank": Allocator(
        _trace_rank(False), "Shao et al. 2023", "MS Alg. 1, weight level", ("unstructured",), ("sensitivity",)
    ),
    "trace_rank_layer": Allocator(
        _trace_rank(True), "Shao et al. 2023", "MS Alg. 1, layer level", ("unstructured",), ("sensitivity",)
    ),
    "besa": Allocator(_besa, "Xu et al. 2024", "BESA, section 3.2", _UNSTRUCTURED, ("block_rates",)),
    "dynamic_programming": Allocator(_dynamic, "ffprune", "knapsack over predicted loss curves", needs=("curves",)),
    "fastforward": Allocator(
        _agent("fastforward", starts=False),
        "FastForward Pruning",
        "FF Alg. 1, Eq. 1-5",
        needs=("reward",),
        mapping="greedy_fill",
        transfers=True,
    ),
    "sparsitysolver": Allocator(
        _agent("sparsitysolver", starts=False),
        "SparsitySolver",
        "SS Alg. 1, section 3.1",
        needs=("reward",),
        mapping="sequential_cap",
        reward="inverse_perplexity",
        transfers=True,
    ),
    "warm": Allocator(
        _agent("warm", starts=True),
        "ffprune",
        "PPO from dynamic programming",
        needs=("reward", "curves"),
        transfers=True,
    ),
    "guided": Allocator(
        _agent("guided", starts=True),
        "ffprune",
        "trials chosen by a model of the loss, which PPO trains on",
        needs=("reward", "curves"),
        reward="divergence",
        transfers=True,
    ),
    "amc": Allocator(
        _amc,
        "He et al. 2018",
        "AMC, reward at the end (SS Fig. 6)",
        needs=("reward",),
        reward="inverse_perplexity",
        replays=True,
    ),
    "eas": Allocator(_eas, "Shen et al. 2024", "the papers' EAS", needs=("reward",), replays=True),
    "evopress": Allocator(
        _evopress,
        "Sieberling et al. 2024",
        "EvoPress, Alg. 1",
        needs=("reward",),
        least_trials=_SMALL_EVOPRESS.trials_per_generation,
        replays=True,
    ),
}
