"""How trials of a search speed up with workers, on one machine.

Rounds of policies near the start at 20%, each round on common text, as a search tries them: by this process, and by Ray
workers, of one thread each (search.threads 1), and by this process with all threads. Starting Ray and the workers'
models is told apart. The first round of each is not counted: it solves levels that the bank lacks. Ways take turns.

    python benchmarks/workers.py [--project FOLDER] [--counts N ...]

It needs what `make run` makes up to the stage levels, and Ray (pip install 'ffprune[ray]'); without them it says so and
ends. Results are kept in results/workers.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# Threads that wait must not spin (src/ffprune/stages/environment.py); read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from rows import row

from ffprune.allocate.dynamic import dynamic_programming
from ffprune.core.outcome import Samples
from ffprune.models.checkpoint import read_view
from ffprune.stages import artifacts
from ffprune.stages.cluster import hired
from ffprune.stages.context import Nowhere, StageContext
from ffprune.stages.environment import keep_memory
from ffprune.stages.params import load_params
from ffprune.stages.record import CURVES, DENSE, LEVELS, stage_named
from ffprune.stages.search_reward import search_reward
from ffprune.stages.sections import Params, Workers

RESULTS = Path(__file__).resolve().parent / "results" / "workers.json"
ROUNDS, BATCH, TURNS = 4, 8, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--project", type=Path, default=RESULTS.parent.parent.parent)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2], help="of workers")
    chosen = parser.parse_args()
    lacks = [] if (chosen.project / LEVELS).is_dir() else [f"{chosen.project} has no {LEVELS}; make run makes it"]
    lacks += [] if importlib.util.find_spec("ray") else ["Ray is not installed: pip install 'ffprune[ray]'"]
    if lacks:
        print(f"skipped: {'; '.join(lacks)}", file=sys.stderr)
        return 0
    os.chdir(chosen.project)
    keep_memory()
    params = load_params()
    torch.set_float32_matmul_precision(params.compute.matmul_precision)
    ways = {"one thread": (0, 1), "all threads": (0, 0), **{f"{n} workers": (n, 1) for n in chosen.counts}}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(TURNS):
        for name, (count, threads) in ways.items():
            seconds[name].append(_measure(params, count, threads, seed=turn))
            print(name, json.dumps(seconds[name][-1]), flush=True)
    RESULTS.write_text(json.dumps({"rows": _rows(seconds), "seconds": seconds}, indent=1) + "\n")
    return 0


def _measure(params: Params, count: int, threads: int, seed: int) -> dict[str, float]:
    """Seconds until the first answer of the warm-up round's end, and of all rounds behind it together."""
    search = params.search.model_copy(update={"threads": threads})
    params = params.model_copy(update={"search": search})
    context = StageContext(stage_named("search"), params, Nowhere())
    units = read_view(Path(DENSE), params.units.heads).units
    curves = [np.array(row["loss"]) for row in artifacts.read_json(Path(CURVES))]
    rng = np.random.default_rng(seed)

    def near() -> Any:
        bent = [factor * curve for factor, curve in zip(rng.lognormal(0, 0.1, len(curves)), curves, strict=True)]
        return dynamic_programming(units, bent, search.sparsity, search.bounds(), search.step)

    started = time.monotonic()
    with hired(partial(search_reward, context), Workers(count=count, address=None, gpus=0), search) as reward:
        list(reward.many([near() for _ in range(BATCH)], Samples(search.samples, 0)))
        ready = time.monotonic()
        for draw in range(1, 1 + ROUNDS):
            list(reward.many([near() for _ in range(BATCH)], Samples(search.samples, draw)))
        ended = time.monotonic()
    return {"ready": round(ready - started, 2), "rounds": round(ended - ready, 2)}


def _rows(seconds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Speed-ups over this process alone with one thread, each turn by itself."""
    setting = (
        f"SmolLM2-135M-Instruct, {ROUNDS} rounds of {BATCH} trials at 20%, each of the default's windows, bfloat16, "
        f"{os.cpu_count()} processors, {TURNS} turns"
    )
    rows = []
    for name, runs in seconds.items():
        gains = [alone["rounds"] / run["rounds"] for alone, run in zip(seconds["one thread"], runs, strict=True)]
        way = name.replace(" ", "_")
        rows.append(row(f"speed_up_{way}", gains, "report", setting))
        rows.append(row(f"seconds_until_ready_{way}", [run["ready"] for run in runs], "report", setting))
    return rows


if __name__ == "__main__":
    sys.exit(main())
