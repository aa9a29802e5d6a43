"""What the stages cost against the size of a model: Llamas of random weights, 15 million to a billion parameters.

Every step is timed in turns with a bare forward pass of the decoder over as many tokens, in one process: figures are
ratios, which say what a step costs on a machine where the forward pass is known. Random weights take as long as
trained ones. Steps that do not read tokens (ranking, the levels) are told against a forward pass of 16,384.

    python benchmarks/scale.py [--size NAME ...] [--again]

It needs nothing but the memory: 9 GB for the largest. Sizes that were measured are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# Threads that wait must not spin (src/ffprune/stages/environment.py); read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import row
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ffprune.allocate.uniform import handmade
from ffprune.compress.follow import follow
from ffprune.compress.levels import Levels
from ffprune.compress.structured import prepare
from ffprune.core.budget import Bounds
from ffprune.core.gram import Gram
from ffprune.core.importance import rank
from ffprune.core.outcome import Samples
from ffprune.core.units import Allocation
from ffprune.evaluate.logits import reduce_logits
from ffprune.evaluate.reward import ModelReward
from ffprune.models.calibration import Calibration
from ffprune.models.curvature import output_curvature
from ffprune.models.view import ModelView
from ffprune.stages.environment import keep_memory
from ffprune.stages.evidence import last_grams

RESULTS = Path(__file__).resolve().parent / "results" / "scale.json"
VOCABULARY, SEQLEN, WINDOWS, BATCH, SAMPLED = 8192, 256, 4, 2, 3
TOKENS = 16384
"""Of the forward pass that steps without tokens are told against."""
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "15M": (256, 688, 12, 4, 2),
    "60M": (512, 1376, 16, 8, 4),
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "1B": (2048, 5632, 20, 32, 8),
}
"""Hidden width, FFN width, layers, heads, key/value heads."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    chosen = parser.parse_args()
    keep_memory()
    known: dict[str, Any] = json.loads(RESULTS.read_text())["sizes"] if RESULTS.is_file() else {}
    for size in chosen.size:
        if size in known and not chosen.again:
            continue
        known[size] = measure(size)
        print(size, json.dumps(known[size]), flush=True)
        RESULTS.write_text(json.dumps({"rows": _rows(known), "sizes": known}, indent=1) + "\n")
    return 0


def measure(size: str) -> dict[str, Any]:
    """Seconds of every step over those of the forward pass beside it."""
    torch.manual_seed(0)
    hidden, width, layers, heads, groups = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    view = ModelView(model)
    windows = torch.randint(VOCABULARY, (WINDOWS, SEQLEN))
    ratios: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    def beside(name: str, step: Callable[[], object], tokens: int, times: int = 3) -> None:
        """Time a step in turns with a forward pass in the model's present dtype and shape."""
        pairs = []
        for _ in range(times):
            pairs.append((_seconds(step), _seconds(lambda: _forward(view, windows)) * tokens / windows.numel()))
        ratios[name] = round(median(mine / bare for mine, bare in pairs), 3)

    def calibrate() -> list[Gram]:
        return list(last_grams(view, Calibration(windows, BATCH), whole=True))

    grams = calibrate()
    beside("calibrate", calibrate, windows.numel())
    generator = torch.Generator().manual_seed(0)
    beside(
        "curvature",
        lambda: output_curvature(view, view.last_maps, windows, BATCH, generator),
        windows.numel(),
        1,
    )
    # A few layers are ranked and solved; the others are like them.
    few, share = range(2 * min(SAMPLED, layers)), layers / min(SAMPLED, layers)
    squares = [_gram(gram.xx) for gram in grams]
    orders: list[Tensor] = []

    def ranking() -> None:
        orders.clear()
        for index in few:
            parts = view.unit_linears(index)
            found = rank(
                "compensated_elimination", parts.last.weight, squares[index], parts.width[parts.last_role], 0.01
            )
            orders.append(found.order)

    beside("rank", ranking, TOKENS, 1)
    ratios["rank"] = round(ratios["rank"] * share, 3)
    everything = [orders[i] if i < len(orders) else torch.arange(u.granules) for i, u in enumerate(view.units)]
    levels = Levels(view, everything, squares, 0.01)

    def solving() -> None:
        for index in few:
            granules = view.units[index].granules
            for kept in range(granules // 4 or 1, granules, max(1, granules // 24)):
                levels.make(index, kept)

    beside("levels", solving, TOKENS, 1)
    ratios["levels"] = round(ratios["levels"] * share, 3)
    policy = handmade(view.units, 0.2, Bounds(0.2, 1.0))
    plan = prepare(view, everything, levels, torch.bfloat16)
    reward = ModelReward(
        model=model,
        apply=plan.apply,
        dense=Allocation.dense(view.units),
        windows=windows,
        kind="divergence",
        trial_samples=1,
        fixed=1,
        batch_size=1,
        threads=torch.get_num_threads(),
        seed=0,
    )
    reward(policy, Samples(1, 0))  # the dense model's part, and levels that the bank of the pipeline would have

    def trial() -> None:
        reward._known.clear()
        reward(policy, Samples(1, 0))

    one = windows[:1]
    pairs = [(_seconds(trial), _seconds(lambda: _logits(model, one))) for _ in range(7)]
    ratios["trial"] = round(median(mine / bare for mine, bare in pairs), 3)
    plan.apply(Allocation.dense(view.units))
    model.to(dtype=torch.float32)
    bare = median(_seconds(lambda: _forward(view, windows)) for _ in range(3))
    ratios["stream"] = round(_seconds(lambda: follow(view, policy, windows, 1, everything, 0.01)) / bare, 3)
    return ratios


def _gram(xx: Tensor | None) -> Tensor:
    """A Gram of full rank: as long to factorise as that of enough text."""
    assert xx is not None
    return xx + torch.eye(len(xx)) * xx.diagonal().mean()


def _forward(view: ModelView, windows: Tensor) -> None:
    decoder = view.model.get_decoder()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        for start in range(0, len(windows), BATCH):
            decoder(input_ids=windows[start : start + BATCH], use_cache=False)


def _logits(model: LlamaForCausalLM, windows: Tensor) -> None:
    reduce_logits(model, windows, 1, lambda logits, labels, first: logits[:, 0].float())


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


UNITS = {
    "calibrate": "a forward pass of the same tokens, float32",
    "curvature": "a forward pass of the same tokens, float32",
    "rank": f"a forward pass of {TOKENS} tokens, float32",
    "levels": f"a forward pass of {TOKENS} tokens, float32",
    "trial": "a bare forward pass of the same pruned model and tokens, bfloat16, head included",
    "stream": "a forward pass of the dense model over the same tokens, float32; repairs included",
}


def _rows(known: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for step, unit in UNITS.items():
        for size, ratios in known.items():
            setting = f"random Llama of {ratios['parameters'] / 1e6:.0f}M parameters, over {unit}"
            rows.append(row(f"{step}_over_forward_{size}", [ratios[step]], "report", setting))
    return rows


if __name__ == "__main__":
    sys.exit(main())
