"""Results as a study would write them, made up: the better the method's place in a list, the better its perplexity."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from ffprune.core.latency import BlockTimes
from ffprune.models.view import ModelView
from ffprune.stages.exhibits.results import Setting

SETTING = Setting("SmolLM2-135M-Instruct", "Wikipedia articles", "float32", 0)
LAYERS = 30
KINDS = {"none": "none", "slice": "structured", "slicegpt": "hidden width", "svd_llm": "rank"}
ROLES = {"q": 331776, "k": 110592, "v": 110592, "o": 331776, "gate": 884736, "up": 884736, "down": 884736}
PRUNABLE, WHOLE, DENSE = 106168320, 134515008, 21.38


def result(name: str, recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A result of the recipe, the same for the same name; ``changes`` replaces some of its keys."""
    rng = random.Random(name)
    sparsity = recipe["sparsity"]
    structured = recipe["compressor"] in ("slice", "slicegpt", "svd_llm")
    base = 0.5 * sparsity / 0.2 if structured else 3.2 * math.expm1(6 * max(sparsity - 0.45, 0)) + 0.2
    worse = base * rng.uniform(0.5, 1.4) * (0.7 if recipe["repair"] == "ridge" else 1)
    value = DENSE * (1 + (worse if recipe["compressor"] != "none" else 0) + 0.3 * bool(recipe["quantize"]))
    gone = round(PRUNABLE * sparsity * (0.45 if recipe["compressor"] == "slicegpt" else 1))
    trials = (recipe["trials"] or 0) + (recipe["first"]["trials"] if recipe["first"] else 0)
    units = policy(sparsity, structured, rng)
    bits = recipe["quantize"]["bits"] if recipe["quantize"] else 16
    made: dict[str, Any] = {
        "name": name,
        "label": recipe["label"],
        "recipe": recipe,
        "granularity": KINDS.get(recipe["compressor"], "unstructured"),
        "sparsity": sparsity,
        "prunable_before": PRUNABLE,
        "prunable_after": PRUNABLE - gone,
        "params_before": WHOLE,
        "params_after": WHOLE - gone,
        "bits_per_weight": float(bits),
        "compression": 16 / bits / (1 - sparsity),
        "perplexity": {"test": {"value": value, "dense": DENSE, "stderr": 0.01, "windows": 40, "tokens": 40920}},
        "zero_shot": {},
        "speed": {},
        "seconds": {"decide": 2.0 * trials + 0.4, "prune": rng.uniform(40, 200), "evaluate": 60.0},
        "trials": trials,
        "policy": [] if recipe["compressor"] in ("none", "slicegpt", "svd_llm") else units,
        "episodes": episodes(trials, value, rng),
        "policies": {},
        "facts": {},
    }
    if trials:
        for trial in sorted({0, trials // 3, 2 * trials // 3, trials - 1}):
            noise = 0.3 * (1 - trial / trials)
            made["policies"][str(trial)] = [
                min(1.0, max(0.1, unit["retention"] + rng.gauss(0, noise))) for unit in units
            ]
    if recipe["zero_shot"]:
        made["zero_shot"] = {
            "boolq": {"acc": 0.6 - 0.1 * sparsity, "n": 64},
            "wiki_continuation": {"acc": 0.7, "acc_norm": 0.72 - rng.uniform(0.2, 0.6) * sparsity, "n": 40},
        }
    if recipe["speed"]:
        faster = rng.uniform(1, 1.2) if sparsity else 1
        made["speed"] = {f"{kind}_tokens_per_s": speed * faster for kind, speed in (("prefill", 347), ("decode", 9))}
        made["speed"] |= {"prefill_over_dense": faster, "decode_over_dense": faster}
    # What is not JSON would not be in a result.
    return dict(json.loads(json.dumps(made | changes, allow_nan=False)))


def policy(sparsity: float, structured: bool, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of an allocation over 30 layers."""
    rows = []
    for layer in range(LAYERS):
        bow = 0.35 * math.cos(2 * math.pi * layer / LAYERS)
        parts = [("attention", 3, 294912), ("ffn", 1536, 1728)] if structured else [(r, n, 1) for r, n in ROLES.items()]
        for part, granules, size in parts:
            kept = round(granules * min(1, max(0.1, 1 - sparsity + sparsity * bow + rng.gauss(0, 0.05))))
            rows.append(
                {
                    "unit": f"layers.{layer}.{part}",
                    "kind": part if structured else "weight",
                    "layer": layer,
                    "granules": granules,
                    "kept": kept,
                    "retention": round(kept / granules, 6),
                    "params_per_granule": size,
                }
            )
    return rows


def episodes(trials: int, value: float, rng: random.Random) -> list[dict[str, Any]]:
    """A search that gets better, with one trial whose perplexity is not finite."""
    rows = []
    for trial in range(trials):
        found = value * (1 + 1.5 * math.exp(-3 * trial / trials) * rng.uniform(0.5, 1.5))
        broken = trial == 1
        rows.append({"trial": trial, "reward": 0.0 if broken else 10 / found, "perplexity": None if broken else found})
    return rows


def traces() -> list[dict[str, Any]]:
    """Hessian traces with the ends and the value and down matrices the most sensitive."""
    rng = random.Random(0)
    rows = []
    for layer in range(LAYERS):
        ends = 3 * abs(layer - 14.5) / 14.5
        for role, weights in ROLES.items():
            trace = weights * 10 ** (ends - 7 + (1.5 if role in ("v", "down") else 0) + rng.gauss(0, 0.3))
            trace -= 0.2 * weights * 1e-6 * (role == "q")
            rows.append(
                {
                    "matrix": f"layers.{layer}.{role}",
                    "weights": weights,
                    "trace": trace,
                    "trace_stderr": abs(trace) * 0.2,
                    "sensitivity": trace / weights,
                }
            )
    return rows


def block_times(view: ModelView) -> tuple[BlockTimes, ...]:
    """3 ms for every dense attention, of which one group takes 2; 2 ms for an FFN, straight down to nothing."""
    times = []
    for kind in ("attention", "ffn"):
        units = [unit for unit in view.units if unit.kind == kind]
        granules = units[0].granules
        ends = (2.0, 3.0) if kind == "attention" else (2 / granules, 2.0)
        times.append(BlockTimes(tuple(unit.name for unit in units), granules, (1, granules), ends))
    return tuple(times)
