"""Quality on WikiText-2, under the protocol that the peers' own code was measured with on the default model.

Word-level WikiText-2, each file tokenised once as one string; calibration on the first 32 windows of 1,024 tokens of
the validation file (128 where a name says so); perplexity on the first 40 windows of 1,024 of the test file. Searches
are rewarded on windows of 512 of the validation file behind the calibration text. The figures of the published code
(the authors' own repositories, float32) are facts of that measurement. What 20% means differs: FLAP and SVD-LLM remove
that share of the decoder's linear weights, SliceGPT of the hidden width.

    python benchmarks/peers.py [--data FOLDER] [--model FOLDER] [--again] [NAME ...]

It needs ``models/dense`` of the default pipeline, and a folder with wikitext2_word_validation.txt and
wikitext2_word_test.txt; without them it says so and ends. Results are kept in results/peers.json one by one: what
stands there is not measured again, unless it is named or --again is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait must not spin (src/ffprune/stages/environment.py); read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import row as metric
from torch import Tensor

from ffprune.allocate.search import NoStore
from ffprune.evaluate.perplexity import perplexity
from ffprune.models.calibration import Calibration
from ffprune.models.checkpoint import load_model, load_tokenizer
from ffprune.models.view import ModelView
from ffprune.models.windows import token_windows
from ffprune.stages.compressing import check_model, compress
from ffprune.stages.deciding import Deciding
from ffprune.stages.environment import keep_memory
from ffprune.stages.params import load_params
from ffprune.stages.sections import Recipe, Study, Workers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"
WINDOWS = 32
"""Of calibration, where a row does not ask for more."""
TOLERANCE = 0.03
"""A method of the published code should come within this of its figure."""


@dataclass(frozen=True)
class Peer:
    """One method at its sparsities, and what the published code reached.

    Attributes:
        parts: of the recipe, besides the nulls.
        published: sparsity -> perplexity of the authors' own code; None where it was not measured.
    """

    parts: dict[str, Any]
    published: dict[float, float | None]


def _mask(allocator: str, criterion: str, **more: Any) -> dict[str, Any]:
    return {"allocator": allocator, "compressor": "mask", "criterion": criterion, **more}


def _sparsegpt(allocator: str, criterion: str, **more: Any) -> dict[str, Any]:
    return {"allocator": allocator, "compressor": "sparsegpt", "criterion": criterion, **more}


def _slice(allocator: str, criterion: str, repair: str | None, **more: Any) -> dict[str, Any]:
    return {"allocator": allocator, "compressor": "slice", "criterion": criterion, "repair": repair, **more}


_UNMEASURED = dict.fromkeys((0.5, 0.6, 0.7))
_STRUCTURED = dict.fromkeys((0.2, 0.3))
PEERS: dict[str, Peer] = {
    "wanda": Peer(_mask("uniform", "wanda"), {0.5: 41.1, 0.6: 93.4, 0.7: 553.0}),
    "sparsegpt": Peer(_sparsegpt("uniform", "obs"), {0.5: 32.8, 0.6: 53.0, 0.7: 101.7}),
    "flap": Peer(_slice("flap", "flap", "bias", inputs="dense"), {0.2: 30.4, 0.3: 45.8}),
    "slicegpt": Peer({"compressor": "slicegpt"}, {0.2: 36.5, 0.3: 49.5}),
    "svd_llm": Peer({"compressor": "svd_llm"}, {0.2: 48.0, 0.3: 66.9}),
    "owl": Peer(_mask("owl", "wanda"), {0.5: None, 0.6: 91.2, 0.7: 503.0}),
    "magnitude": Peer(_mask("uniform", "magnitude"), {0.5: 469.0, 0.6: 3217.0, 0.7: 98790.0}),
    "isc": Peer(_sparsegpt("uniform", "isc"), _UNMEASURED),
    "mixed_isc": Peer(_sparsegpt("trace_rank", "isc"), _UNMEASURED),
    "sparsegpt_weighted": Peer(_sparsegpt("uniform", "obs", tokens="weighted"), _UNMEASURED),
    "mixed_weighted": Peer(_sparsegpt("trace_rank", "obs", tokens="weighted"), _UNMEASURED),
    "dynamic_weighted": Peer(_sparsegpt("dynamic_programming", "obs", tokens="weighted"), _UNMEASURED),
    "dynamic_ridge": Peer(_slice("dynamic_programming", "compensated_elimination", "ridge"), _STRUCTURED),
    "dynamic_stream": Peer(_slice("dynamic_programming", "compensated_elimination", "stream"), _STRUCTURED),
    "dynamic_stream_128": Peer(
        _slice("dynamic_programming", "compensated_elimination", "stream", calibration_windows=128), _STRUCTURED
    ),
    "guided_stream": Peer(_slice("guided", "compensated_elimination", "stream", trials=48), _STRUCTURED),
    "dynamic_wanda": Peer(_mask("dynamic_programming", "wanda"), _UNMEASURED),
    "dynamic_isc": Peer(_sparsegpt("dynamic_programming", "isc"), _UNMEASURED),
    "guided_wanda": Peer(_mask("guided", "wanda", trials=48), _UNMEASURED),
    "handmade_ridge": Peer(_slice("handmade", "compensated_elimination", "ridge"), _STRUCTURED),
    "uniform_ridge": Peer(_slice("uniform", "compensated_elimination", "ridge"), _STRUCTURED),
    "besa": Peer(_mask("besa", "wanda"), _UNMEASURED),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "dense")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("names", nargs="*", help=f"such as wanda or wanda-50; of {', '.join(PEERS)}")
    chosen = parser.parse_args()
    texts = {name: chosen.data / f"wikitext2_word_{name}.txt" for name in ("validation", "test")}
    if not all(path.is_file() for path in texts.values()) or not chosen.model.is_dir():
        print(f"skipped: {chosen.data} has no WikiText-2 text, or {chosen.model} no model", file=sys.stderr)
        return 0
    keep_memory()
    study = load_params(HERE.parent / "params.yaml").study
    tokenizer = load_tokenizer(chosen.model)
    validation = texts["validation"].read_text()
    calibration = token_windows(tokenizer, validation, 1024)
    search = token_windows(tokenizer, validation, study.search.seqlen)[WINDOWS * 1024 // study.search.seqlen :]
    test = token_windows(tokenizer, texts["test"].read_text(), 1024, 40)
    known = {row["name"]: row for row in json.loads(RESULTS.read_text())["methods"]} if RESULTS.is_file() else {}
    if "dense" not in known or chosen.again:
        model = load_model(chosen.model, torch.float32)
        _keep(known, {"name": "dense", "perplexity": perplexity(model, test, 4).value})
    for name, peer in PEERS.items():
        for sparsity, published in peer.published.items():
            key = f"{name}-{100 * sparsity:g}"
            if (name in chosen.names or key in chosen.names) if chosen.names else (chosen.again or key not in known):
                row = {"name": key, "published": published}
                row |= _measure(chosen.model, _recipe(key, sparsity, peer), study, calibration, search, test)
                row["ratio"] = round(row["perplexity"] / known["dense"]["perplexity"], 4)
                _keep(known, row)
                print(_line(row), flush=True)
    return 0


def _recipe(label: str, sparsity: float, peer: Peer) -> Recipe:
    nothing = dict.fromkeys(("criterion", "repair", "pattern", "calibration_windows", "quantize", "trials", "first"))
    plain = {"model": "dense", "inputs": "pruned", "tokens": "equal", "allocator": "uniform"}
    fixed = {**plain, **dict.fromkeys(("zero_shot", "speed", "save"), False)}
    return Recipe(**{**nothing, **fixed, "label": label, "sparsity": sparsity, **peer.parts})


def _measure(
    folder: Path, recipe: Recipe, study: Study, calibration: Tensor, search: Tensor, test: Tensor
) -> dict[str, Any]:
    """Pruned and measured in float32; the trials of a search run in bfloat16.

    Products are in bfloat16 where torch may choose ("medium"), which is several times faster here. At 70% a model is so
    near collapse that this alone moves Wanda's perplexity by half: "highest" there.
    """
    precision = "highest" if recipe.sparsity >= 0.7 else "medium"
    torch.set_float32_matmul_precision(precision)
    view = ModelView(load_model(folder, torch.float32))
    text = Calibration(calibration[: recipe.calibration_windows or WINDOWS], study.calibration.batch_size)
    deciding = Deciding(
        name=recipe.label,
        recipe=recipe,
        study=study,
        view=view,
        calibration=text,
        validation=lambda: search,
        trial_dtype=torch.bfloat16,
        seed=0,
        workers=Workers(count=0, address=None, gpus=0),
        store=lambda _: NoStore(),
    )
    check_model(recipe.label, recipe, view)
    started = time.monotonic()
    decision = None
    if deciding.rows[1].has_units:
        deciding.check()
        decision = deciding.decide()
    decided = time.monotonic()
    allocation = decision.allocation if decision else None
    facts = compress(recipe, study, view, text, allocation)
    pruned = time.monotonic()
    value = perplexity(view.model, test, 4).value
    return {
        "perplexity": round(value, 3),
        "sparsity": decision.allocation.sparsity if decision else recipe.sparsity,
        "decide_seconds": round(decided - started, 1),
        "prune_seconds": round(pruned - decided, 1),
        "trials": len(deciding.trials),
        "precision": precision,
        "facts": facts | (decision.facts if decision else {}),
    }


def _keep(known: dict[str, Any], row: dict[str, Any]) -> None:
    known[row["name"]] = row
    setting = {
        "model": "SmolLM2-135M-Instruct (Q4_1, de-quantised)",
        "calibration": "WikiText-2 word level, validation, first 32 x 1024 tokens; rows named _128: first 128",
        "test": "WikiText-2 word level, test, first 40 x 1024 tokens",
        "dtype": "float32, products at torch's precision of the row; trials of a search in bfloat16",
        "seed": 0,
        "command": "python benchmarks/peers.py",
    }
    methods = list(known.values())
    RESULTS.write_text(json.dumps({"setting": setting, "rows": _rows(methods), "methods": methods}, indent=2) + "\n")


def _rows(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexities over the dense model's; the published code's is the goal, to within TOLERANCE."""
    dense = next(method["perplexity"] for method in methods if method["name"] == "dense")
    return [
        metric(
            f"{method['name']}_over_dense",
            [method["perplexity"] / dense],
            f"{method['published'] / dense:.4f} within {TOLERANCE:.0%}" if method["published"] else "report",
            f"WikiText-2 as in `setting`, products at {method.get('precision', 'an unrecorded precision')}",
        )
        for method in methods
        if method["name"] != "dense"
    ]


def _line(row: dict[str, Any]) -> str:
    line = f"{row['name']}: {row['perplexity']:.2f} ({row['ratio']:.3f} times dense)"
    if row["published"]:
        off = row["perplexity"] / row["published"] - 1
        verdict = "" if abs(off) <= TOLERANCE else f", beyond {TOLERANCE:.0%}"
        line += f"; published code {row['published']:g}: {off:+.1%}{verdict}"
    return line + f"; decided in {row['decide_seconds']:.0f} s, pruned in {row['prune_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
