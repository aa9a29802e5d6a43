"""What a search costs and finds, beside evolutionary search in the same space, with the same cuts and evaluator.

Every search is rewarded by the divergence from the dense model on windows of validation text that it may draw, and its
answer is judged by perplexity on the fixed windows that no search draws from. EAS and EvoPress begin with the uniform
policy and random ones, as published, and spend --trials; ours begins with the loss curves of the sensitivity stage,
whose tokens are counted (three times: forward and backward), as are all comparisons of candidates. EvoPress from our
start (evopress_informed), and FF and SS as printed, spend as many tokens as ours. An ablation changes one thing about
ours, at 20%, with the first seed. One process, one machine: ratios only.

    python benchmarks/search.py [--project FOLDER] [--seeds N] [--trials N] [--again] [--sparsity S ...]
                                [--method NAME ...]

It needs what `make run` makes up to the stage levels; without it says so and ends. Runs are kept in
results/search_runs.json one by one, and not repeated; results/search.json has the metrics.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Threads that wait must not spin (src/ffprune/stages/environment.py); read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from rows import row as result_row

from ffprune.allocate.agent import PRESETS
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.evolution import Evolution, eas
from ffprune.allocate.evopress import EvoPress, evopress
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.guided import GuidedResult, guided
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate
from ffprune.allocate.search import NoStore, SearchResult, Store, search
from ffprune.allocate.uniform import handmade, uniform
from ffprune.compress.structured import Plan, prepare
from ffprune.core.budget import Bounds
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation
from ffprune.evaluate.logits import reduce_logits
from ffprune.evaluate.reward import ModelReward
from ffprune.models.curvature import output_curvature
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.environment import keep_memory
from ffprune.stages.inputs import DTYPES, load, read_orders, sample_windows
from ffprune.stages.levels import read_levels
from ffprune.stages.params import load_params
from ffprune.stages.record import CURVES, DENSE, LEVELS, ORDER, VALIDATION
from ffprune.stages.reward import trial_reward
from ffprune.stages.search_store import SearchStore
from ffprune.stages.sections import Params

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "results" / "search_runs.json", HERE / "results" / "search.json"
BOUNDS, STEP, FIXED, SAMPLES = Bounds(0.2, 1.0), 32, 16, 2
ROUNDS = 30
"""Turns in which each part of the cost is measured first, second and last."""
TRIALS = 48
"""Of ours; what the others spend is measured against it."""
Curves = list[NDArray[np.float64]]


class Bench:
    """The default project's model, set up as the stage search does.

    Args:
        root: the project.
        params: its parameters.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self.params = params
        windows = sample_windows(root / DENSE, root / VALIDATION, params.search.seqlen, 0, params.seed, "search.seqlen")
        view = ModelView(load(root / DENSE, params.compute, torch.float32))
        self.curves: Curves = [np.array(row["loss"]) for row in artifacts.read_json(root / CURVES)]
        self.dense = root / DENSE
        fisher = params.sensitivity.fisher
        self.evidence_tokens = 3 * fisher.windows * fisher.seqlen
        orders = read_orders(view, root / ORDER, repaired=True)
        levels = read_levels(view, orders, lambda name: root / name, params.levels.damping, STEP)
        self.plan: Plan = prepare(view, orders, levels, DTYPES[params.compute.dtype])
        self.units = view.units
        self.windows = windows
        self.reward = self.reward_of("divergence")

    def reward_of(self, kind: str, repaired: bool = True) -> ModelReward:
        """A reward of the same samples; without repair, the cut as it is."""
        spent = {"samples": SAMPLES, "final_samples": FIXED, "batch_size": 8}
        trials = self.params.search.model_copy(update=spent)
        plan = self.plan if repaired else replace(self.plan, levels=None)
        return trial_reward(plan, self.units, self.windows, kind, trials, 0)

    def problem(self, sparsity: float, curves: Curves | None) -> Problem:
        """With the starts that the stage search knows, or, without curves, with the uniform policy alone."""
        starts = {"uniform": uniform(self.units, sparsity, BOUNDS)}
        if curves is not None:
            starts = {
                "dynamic programming": dynamic_programming(self.units, curves, sparsity, BOUNDS, STEP),
                "handmade": handmade(self.units, sparsity, BOUNDS),
            }
        return Problem(self.units, sparsity, BOUNDS, "water_fill", STEP, self.reward, starts)

    @property
    def ignorant(self) -> Curves:
        """Curves of somebody who knows the units' sizes and nothing of the model."""
        return [u.params * (1 - np.linspace(0, 1, u.granules + 1)) ** 2 for u in self.units]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--project", type=Path, default=HERE.parent)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=450, help="of each rival, about")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS), help="all if none is named")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    chosen = parser.parse_args()
    if not (chosen.project / LEVELS).is_dir():
        print(f"skipped: {chosen.project} has no {LEVELS}; make run makes it", file=sys.stderr)
        return 0
    params = load_params(chosen.project / "params.yaml")
    keep_memory()
    torch.set_float32_matmul_precision(params.compute.matmul_precision)
    bench = Bench(chosen.project, params)
    runs: dict[str, Any] = json.loads(RUNS.read_text()) if RUNS.is_file() and not chosen.again else {}
    if "cost" not in runs:
        runs["cost"] = _cost(bench) | {"learn": _learning(bench)}
        _keep(runs)
    if "noise" not in runs:
        runs["noise"] = _noise(bench)
        _keep(runs)
    if "seconds" not in runs:
        runs["seconds"] = _seconds(bench, chosen.trials)
        _keep(runs)
    for seed in range(chosen.seeds):
        for sparsity in chosen.sparsity:
            for name in chosen.method:
                run = partial(METHODS[name], bench, sparsity, seed, chosen.trials)
                _measure(runs, f"{name} {sparsity:g} seed {seed}", run)
    for name, ablate in ABLATIONS.items():
        _measure(runs, f"ablation: {name}", partial(ablate, bench))
    return 0


def _measure(runs: dict[str, Any], key: str, run: Callable[[], dict[str, Any]]) -> None:
    if key in runs:
        return
    started = time.monotonic()
    found = run()
    runs[key] = found | {"seconds": round(time.monotonic() - started, 1)}
    _keep(runs)
    print(key, json.dumps(runs[key]), flush=True)


def _guided(
    problem: Problem,
    curves: Curves,
    trials: int,
    seed: int,
    schedule: Schedule,
    trained: Any = None,
    store: Store | None = None,
) -> GuidedResult:
    return guided(
        problem,
        curves,
        Guidance(0.1, 0.4),
        PRESETS["guided"],
        schedule,
        trials,
        2,
        seed,
        NoStore() if store is None else store,
        lambda episode: None,
        trained,
    )


FLAT = Schedule(1.0, 1.0, 0.0)


def _ours(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
    """The best answer after 0, 16, 32 and 48 trials; what was tried before comes from the reward's memory."""
    del trials
    steps = []
    for count in range(0, TRIALS + 1, 16):
        found = _guided(bench.problem(sparsity, bench.curves), bench.curves, count, seed, FLAT)
        steps.append(_spent(found, bench.evidence_tokens))
    return {"steps": steps, **steps[-1]}


def _transferred(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
    """No trial, 8 and 16, after a search at the other sparsity, whose tokens are not counted."""
    del trials
    other = 0.5 - sparsity
    first = _guided(bench.problem(other, bench.curves), bench.curves, TRIALS, seed, FLAT)
    steps = []
    for count in (0, 8, 16):
        found = _guided(bench.problem(sparsity, bench.curves), bench.curves, count, seed, FLAT, first.agent)
        steps.append(_spent(found, 0))
    return {"steps": steps, **steps[-1]}


def _ppo(preset: str, mapping: str, reward: str, informed: bool) -> Callable[[Bench, float, int, int], dict[str, Any]]:
    def run(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
        del trials
        evidence = bench.evidence_tokens if informed else 0
        # As many tokens as ours reads: the evidence is worth trials too.
        count = TRIALS + round((bench.evidence_tokens - evidence) / (SAMPLES * (bench.windows.shape[1] - 1)))
        problem = bench.problem(sparsity, bench.curves if informed else None)
        problem = replace(problem, mapping=mapping, reward=bench.reward_of(reward))
        schedule = Schedule.scaled(0.6, 0.01, 500, episodes=count)
        found = search(problem, PRESETS[preset], schedule, count, 2, seed, NoStore(), lambda episode: None)
        return _judged(bench, _spent(found, evidence), found.best)

    return run


def _eas(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
    found = eas(bench.problem(sparsity, None), Evolution(), trials, seed, lambda trial: None)
    tokens = sum(t.outcome.tokens for t in found.trials) + _read(found.candidates)
    return {"trials": len(found.trials), "tokens": tokens} | _answer(found.best)


def _evopress(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
    settings = EvoPress(offspring=32, survivors=(4, 1), fidelities=(1 / SAMPLES, 1.0))
    found = evopress(bench.problem(sparsity, None), settings, trials, seed, lambda trial: None)
    tokens = sum(t.outcome.tokens for t in found.trials) + _read(found.candidates)
    return {"trials": len(found.trials), "tokens": tokens} | _answer(found.best)


def _evopress_informed(bench: Bench, sparsity: float, seed: int, trials: int) -> dict[str, Any]:
    """Level switches from the policies that ours starts with, for as many tokens; small generations, so several."""
    del trials
    settings = EvoPress(offspring=8, survivors=(2, 1), fidelities=(1 / SAMPLES, 1.0))
    windows = 8 + 3 * SAMPLES  # of a generation: the offspring on one, the last round's on all
    generations = round(TRIALS * SAMPLES / windows)
    problem = bench.problem(sparsity, bench.curves)
    found = evopress(problem, settings, generations * settings.trials_per_generation, seed, lambda trial: None)
    tokens = bench.evidence_tokens + sum(t.outcome.tokens for t in found.trials) + _read(found.candidates)
    return {"trials": len(found.trials), "tokens": tokens} | _answer(found.best)


METHODS: dict[str, Callable[[Bench, float, int, int], dict[str, Any]]] = {
    "guided": _ours,
    "evopress": _evopress,
    "evopress_informed": _evopress_informed,
    "eas": _eas,
    "warm": _ppo("warm", "water_fill", "divergence", informed=True),
    "fastforward": _ppo("fastforward", "greedy_fill", "perplexity_ratio", informed=False),
    "sparsitysolver": _ppo("sparsitysolver", "sequential_cap", "inverse_perplexity", informed=False),
    "transfer": _transferred,
}


def _ablation(
    *, knows: bool = True, repaired: bool = True, curriculum: bool = False, **change: Any
) -> Callable[[Bench], dict[str, Any]]:
    def run(bench: Bench) -> dict[str, Any]:
        curves = bench.curves if knows else bench.ignorant
        reward = bench.reward if repaired else bench.reward_of("divergence", repaired=False)
        problem = replace(bench.problem(0.2, curves), reward=reward, **change)
        schedule = Schedule.scaled(0.6, 0.01, 500, episodes=TRIALS) if curriculum else FLAT
        found = _guided(problem, curves, TRIALS, 0, schedule)
        return _judged(bench, _spent(found, bench.evidence_tokens if knows else 0), found.best)

    return run


ABLATIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "no warm start": _ablation(knows=False),
    "no compensation in the reward": _ablation(repaired=False),
    "curriculum": _ablation(curriculum=True),
    "mapping greedy_fill": _ablation(mapping="greedy_fill"),
    "mapping sequential_cap": _ablation(mapping="sequential_cap"),
}
"""No surrogate: that is the method warm, which has the same start. No curriculum is how ours runs here."""


def _read(candidates: list[Candidate]) -> int:
    return sum(candidate.outcome.tokens for candidate in candidates)


def _spent(found: SearchResult, evidence: int) -> dict[str, Any]:
    """The answer, the trials and all tokens that were read for it."""
    tokens = evidence + sum(e.outcome.tokens for e in found.episodes) + _read(found.candidates)
    return {"trials": len(found.episodes), "tokens": tokens} | _answer(found.best)


def _judged(bench: Bench, row: dict[str, Any], best: Candidate) -> dict[str, Any]:
    """The same answer, judged as all are: repaired, on the fixed samples."""
    judged = Candidate(best.name, best.allocation, (bench.reward(best.allocation, Samples(FIXED, None)),))
    return row | _answer(judged)


def _answer(best: Candidate) -> dict[str, Any]:
    outcome = best.outcome
    ratio = outcome.perplexity / outcome.dense_perplexity
    return {"source": best.name, "ratio": round(ratio, 5), "divergence": round(outcome.loss, 5)}


def _cost(bench: Bench) -> dict[str, list[float]]:
    """Seconds of setting a policy, of a trial, and of a bare forward pass of the same shapes and tokens."""
    rng = np.random.default_rng(0)
    windows = bench.windows[FIXED : FIXED + SAMPLES]
    seconds: dict[str, list[float]] = {"set": [], "trial": [], "forward": [], "perplexity_trial": []}
    plain = bench.reward_of("perplexity_ratio")
    problem = bench.problem(0.2, bench.curves)
    # As after a search's first trials: every unit was factorised once, for a level that the bank lacks.
    levels = bench.plan.levels
    assert levels is not None
    for index in range(len(bench.units)):
        levels.make(index, 1)
    clock = time.perf_counter

    def trial(kind: str, reward: ModelReward, policy: Allocation) -> None:
        reward._known.clear()
        begun = clock()
        reward(policy, Samples(SAMPLES, 0))
        seconds[kind].append(clock() - begun)

    def forward(policy: Allocation) -> None:
        begun = clock()
        reduce_logits(bench.plan.view.model, windows, 8, lambda logits, labels, first: logits[:, 0].float())
        seconds["forward"].append(clock() - begun)

    parts: list[Callable[[Allocation], None]] = [
        partial(trial, "trial", bench.reward),
        partial(trial, "perplexity_trial", plain),
        forward,
    ]
    for turn in range(2 + 3 * ROUNDS):
        policy = problem.allocate(rng.normal(0, 0.3, len(bench.units)), 0.2)
        # Like a search's policies, these share some levels and not others; no level is made beforehand.
        begun = clock()
        bench.plan.apply(policy)
        seconds["set"].append(clock() - begun)
        # Each is the first behind the setting as often as the others: the weights are not in the cache then.
        for part in parts[turn % 3 :] + parts[: turn % 3]:
            part(policy)
    return {name: values[2:] for name, values in seconds.items()}


@dataclass(frozen=True)
class _Formula:
    """A reward by the sum of the curves, at once: what a search takes with it is what it takes besides its trials."""

    curves: Curves
    most_samples: int = SAMPLES
    fixed: int = FIXED

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        for allocation in allocations:
            loss = sum(float(curve[kept]) for curve, kept in zip(self.curves, allocation.kept, strict=True))
            yield Outcome(math.exp(-loss), loss, math.exp(loss), 1.0, True, samples.count * 511)


def _learning(bench: Bench) -> list[float]:
    """Seconds a trial of all that a search does beside its trials: it plans, imagines, learns and saves."""
    problem = replace(bench.problem(0.2, bench.curves), reward=_Formula(bench.curves))

    def took(trials: int, seed: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            _guided(problem, bench.curves, trials, seed, FLAT, store=SearchStore(Path(folder), bench.units))
            return time.perf_counter() - started

    # What comes before the first trial and behind the last is no part of one.
    return [(took(TRIALS, seed) - took(0, seed)) / TRIALS for seed in range(5)]


def _seconds(bench: Bench, trials: int) -> dict[str, float]:
    """Seconds of whole searches at 20%, one after the other; ours without a trial, and what its start was found by."""
    fisher, generator = bench.params.sensitivity.fisher, torch.Generator().manual_seed(0)
    windows = bench.windows[:, : fisher.seqlen][: fisher.windows]
    view = ModelView(load(bench.dense, bench.params.compute, DTYPES[bench.params.compute.dtype]))
    parts: dict[str, Callable[[], object]] = {
        "evidence": lambda: output_curvature(view, view.last_maps, windows, fisher.batch_size, generator),
        "guided": lambda: _guided(bench.problem(0.2, bench.curves), bench.curves, 0, 0, FLAT),
        "evopress": lambda: _evopress(bench, 0.2, 0, trials),
        "eas": lambda: _eas(bench, 0.2, 0, trials),
    }
    seconds = {}
    for name, part in parts.items():
        bench.reward = bench.reward_of("divergence")  # which remembers what it scored
        started = time.monotonic()
        part()
        seconds[name] = round(time.monotonic() - started, 1)
    return seconds


def _noise(bench: Bench) -> dict[str, float]:
    """Signal to noise of the rewards per 1,000 tokens: differences between policies over their spread across texts.

    Twelve policies near the best known one, each on the same twelve windows. The signal is the standard deviation of
    the policies' means; the noise that of a policy's departure from its mean, less what all policies share on a window.
    """
    rng = np.random.default_rng(1)

    def near() -> Allocation:
        factors = rng.lognormal(0, 0.3, len(bench.curves))
        curves = [factor * curve for factor, curve in zip(factors, bench.curves, strict=True)]
        return dynamic_programming(bench.units, curves, 0.2, BOUNDS, STEP)

    policies = [near() for _ in range(12)]
    tables: dict[str, list[list[float]]] = {"divergence": [], "nll": []}
    for policy in policies:
        single = [_on_window(bench, policy, window) for window in range(12)]
        tables["divergence"].append([pair[0] for pair in single])
        tables["nll"].append([pair[1] for pair in single])
    tokens = bench.windows.shape[1] - 1
    found: dict[str, Any] = {}
    for name, rows in tables.items():
        table = np.array(rows)
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        noise = float(np.sqrt((rest**2).sum() / ((len(rows) - 1) * 11)) * np.sqrt(tokens / 1000))
        signal = float(np.sqrt(max(table.mean(1).var(ddof=1) - (noise**2 * 1000 / tokens) / 12, 0)))
        found |= {f"{name} signal": signal, f"{name} noise": noise, f"{name} ratio": signal / noise}
    return found


def _on_window(bench: Bench, policy: Allocation, window: int) -> tuple[float, float]:
    """Divergence and loss above the dense model of a policy on one window."""
    outcome = bench.reward._score(policy, [window])
    return outcome.loss, float(np.log(outcome.perplexity / outcome.dense_perplexity))


def _keep(runs: dict[str, Any]) -> None:
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    RESULTS.write_text(json.dumps({"rows": _rows(runs)}, indent=2) + "\n")


def _rows(runs: dict[str, Any]) -> list[dict[str, Any]]:
    setting = (
        "SmolLM2-135M-Instruct, default validation text, windows of 512 tokens, bfloat16, trials of "
        f"{SAMPLES} windows, judged on {FIXED} fixed windows"
    )

    row = partial(result_row, setting=setting)
    rows = []
    if cost := runs.get("cost"):
        learn = float(np.median(cost["learn"]))
        trials = list(zip(cost["trial"], cost["forward"], cost["set"], cost["perplexity_trial"], strict=True))
        for name, by in (("", 0), ("_by_perplexity", 3)):
            ratios = [(every[by] + learn) / every[1] for every in trials]
            rows.append(row(f"trial_over_forward{name}", ratios, "<= 1.05"))
        rows.append(row("policy_set_share", [put / trial for trial, _, put, _ in trials], "<= 0.02"))
        rows.append(row("learning_share", [learn / trial for trial, *_ in trials], "report"))
    if noise := runs.get("noise"):
        rows += [row(f"signal_to_noise_{name}", [noise[f"{name} ratio"]], "report") for name in ("divergence", "nll")]
    if seconds := runs.get("seconds"):
        ours_took = seconds["evidence"] + seconds["guided"]
        for rival, goal in (("eas", ">= 3.4, aim 10"), ("evopress", "> 1, aim 3")):
            rows.append(row(f"{rival}_seconds_over_ours_0.2", [seconds[rival] / ours_took], goal))
    for sparsity in ("0.2", "0.3"):
        ours = {k.rsplit(" ", 1)[1]: v for k, v in runs.items() if k.startswith(f"guided {sparsity} ")}
        for rival, goal in (("eas", ">= 3.4, aim 10"), ("evopress", "> 1, aim 3")):
            tokens, quality = [], []
            for seed, mine in ours.items():
                other = runs.get(f"{rival} {sparsity} seed {seed}")
                if other:
                    first = next((s for s in mine["steps"] if s["ratio"] <= other["ratio"]), None)
                    tokens.append(other["tokens"] / first["tokens"] if first else 0.0)
                    quality.append(mine["ratio"] / other["ratio"])
            if tokens:
                rows.append(row(f"{rival}_tokens_over_ours_{sparsity}", tokens, goal))
                rows.append(row(f"ours_over_{rival}_perplexity_{sparsity}", quality, "< 1"))
        for rival in ("warm", "evopress_informed", "fastforward", "sparsitysolver"):
            pairs = _beside(runs, ours, f"{rival} {sparsity}")
            if pairs:
                quality = [mine["ratio"] / other["ratio"] for mine, other in pairs]
                rows.append(row(f"ours_over_{rival}_perplexity_at_equal_tokens_{sparsity}", quality, "< 1"))
        if ours:
            start = [v["ratio"] / v["steps"][0]["ratio"] for v in ours.values()]
            rows.append(row(f"ours_over_dynamic_programming_perplexity_{sparsity}", start, "< 1"))
        pairs = _beside(runs, ours, f"transfer {sparsity}")
        for steps in zip(*(other["steps"] for _, other in pairs), strict=True):
            name = f"transfer_of_{steps[0]['trials']}_trials"
            both = [(mine, step) for (mine, _), step in zip(pairs, steps, strict=True)]
            tokens = [step["tokens"] / mine["tokens"] for mine, step in both]
            quality = [step["ratio"] / mine["ratio"] for mine, step in both]
            rows.append(row(f"{name}_tokens_share_{sparsity}", tokens, "<= 0.15"))
            rows.append(row(f"{name}_over_scratch_perplexity_{sparsity}", quality, "<= 1"))
    whole = runs.get("guided 0.2 seed 0")
    for key, found in runs.items():
        if whole and key.startswith("ablation: "):
            rows.append(
                row(
                    key.replace(": ", "_").replace(" ", "_") + "_over_ours_perplexity",
                    [found["ratio"] / whole["ratio"]],
                    "report",
                )
            )
    return rows


def _beside(runs: dict[str, Any], ours: dict[str, Any], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Ours and another of the same seed."""
    return [(mine, runs[f"{name} seed {seed}"]) for seed, mine in ours.items() if f"{name} seed {seed}" in runs]


if __name__ == "__main__":
    sys.exit(main())
