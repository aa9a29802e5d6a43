"""Quality on WikiText-2, under the protocol that the peers' own code was measured with on the default model.

Word-level WikiText-2, each file tokenised once as one string; calibration on the first 32 windows of 1,024 tokens of
the validation file; perplexity on the first 40 windows of 1,024 of the test file. The peers' ratios (the authors' own
repositories, float32) are facts of that measurement, printed beside ours. What 20% means differs: FLAP and SVD-LLM
remove that share of the decoder's linear weights, SliceGPT of the hidden width.

    python benchmarks/bench_peers.py [--data FOLDER] [--model FOLDER]

It needs ``models/dense`` of the default pipeline, and a folder with wikitext2_word_validation.txt and
wikitext2_word_test.txt; without them it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ffprune.allocate.curves import loss_curve
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.uniform import handmade, uniform
from ffprune.compress.structured import prepare
from ffprune.core.budget import Bounds
from ffprune.core.importance import Ranking, rank
from ffprune.core.units import Allocation
from ffprune.evaluate.perplexity import perplexity
from ffprune.models.checkpoint import load_model, load_tokenizer
from ffprune.models.curvature import output_curvature
from ffprune.models.view import ModelView
from ffprune.models.walk import collect
from ffprune.models.windows import token_windows
from ffprune.stages.inputs import last_map

HERE = Path(__file__).resolve().parent
PEERS = {"FLAP": (1.42, 2.14), "SliceGPT": (1.71, 2.31), "SVD-LLM": (2.24, 3.13)}
DAMPING = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "dense")
    chosen = parser.parse_args()
    texts = {name: chosen.data / f"wikitext2_word_{name}.txt" for name in ("validation", "test")}
    if not all(path.is_file() for path in texts.values()) or not chosen.model.is_dir():
        print(f"skipped: {chosen.data} has no WikiText-2 text, or {chosen.model} no model", file=sys.stderr)
        return 0
    torch.set_float32_matmul_precision("medium")
    tokenizer = load_tokenizer(chosen.model)
    calibration = token_windows(tokenizer, texts["validation"].read_text(), 1024, 32)
    test = token_windows(tokenizer, texts["test"].read_text(), 1024, 40)

    view = ModelView(load_model(chosen.model, torch.bfloat16))
    names = [last_map(view, i) for i in range(len(view.units))]
    collected = collect(view, calibration, names, 4)
    grams = [xx for name in names if (xx := collected[name].xx) is not None]
    generator = torch.Generator().manual_seed(0)
    curvatures = output_curvature(view, calibration[:12, :256], 4, generator)
    view = ModelView(load_model(chosen.model, torch.float32))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        rankings = list(pool.map(lambda i: _rank(view, i, grams[i]), range(len(view.units))))
    curves = [
        loss_curve(r.error.numpy(), c.mean, calibration.numel(), view.unit_linears(i).last.out_features)
        for i, (r, c) in enumerate(zip(rankings, curvatures, strict=True))
    ]
    plan = prepare(view, [r.order for r in rankings], grams, DAMPING, torch.bfloat16)

    def measure(allocation: Allocation) -> float:
        plan.apply(allocation)
        return perplexity(view.model, test, 4, require_finite=True).value

    dense = measure(Allocation.dense(view.units))
    rows = [_row("dense_perplexity", dense, None)]
    for place, sparsity in enumerate((0.2, 0.3)):
        policies = {
            "uniform": uniform(view.units, sparsity, Bounds(0.05, 1.0)),
            "handmade": handmade(view.units, sparsity, Bounds(0.05, 1.0)),
            "dynamic_programming": dynamic_programming(view.units, curves, sparsity, Bounds(0.2, 1.0), 32),
        }
        best_peer = min(ratios[place] for ratios in PEERS.values())
        for name, allocation in policies.items():
            ratio = measure(allocation) / dense
            rows.append(_row(f"{name}_ridge_{sparsity:g}_over_dense", ratio, best_peer))
            print(f"{name} + ridge at {sparsity:g}: {ratio:.3f} times dense", flush=True)
        for name, ratios in PEERS.items():
            print(f"{name} at {sparsity:g}, its authors' code: {ratios[place]:.2f}", flush=True)
    results = HERE / "results" / "peers.json"
    results.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    return 0


def _rank(view: ModelView, index: int, gram: torch.Tensor) -> Ranking:
    torch.set_num_threads(1)
    parts = view.unit_linears(index)
    weight = parts.last.weight.detach()
    return rank("compensated_elimination", weight, gram, parts.width[parts.last_role], DAMPING)


def _row(metric: str, value: float, goal: float | None) -> dict[str, object]:
    return {
        "metric": metric,
        "value": round(value, 4),
        "low": None,
        "high": None,
        "goal": goal,
        "setting": "SmolLM2-135M-Instruct, WikiText-2 word level, 32 x 1024 calibration, 40 x 1024 test, bf16, seed 0",
        "command": "python benchmarks/bench_peers.py",
    }


if __name__ == "__main__":
    sys.exit(main())
