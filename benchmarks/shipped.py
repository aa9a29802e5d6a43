"""What a pruned model gains where it is used: prefill and decode in turns with the dense model, memory, time to load.

Policies are those of dynamic programming over the project's loss curves, at 20, 30 and 50% of the parameters. The gain
in prefill is told as a share of the multiply-adds that went: 1 is a model that is faster by all that was taken out of
it. A model of 1.2 billion random weights stands for larger ones. FFN widths in multiples of several numbers, at 30%,
say what round widths are worth and what they cost in loss; equal shares of each budget, what they take off a prefill.
GGUF files run in llama.cpp, compiled for any processor.

    python benchmarks/shipped.py [--project FOLDER] [speed] [large] [budgets] [loading] [gguf]

It needs what `make run` makes up to the stage sensitivity; without it says so and ends. A quarter of an hour or more.
Parts that are not named keep their figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Threads that wait must not spin (src/ffprune/stages/environment.py); read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from rows import row
from transformers import AutoConfig, PreTrainedModel

from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.units import Allocation
from ffprune.evaluate.latency import Probe, block_latencies
from ffprune.evaluate.speed import Speed, measure
from ffprune.export.gguf import write_gguf
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model
from ffprune.models.surgery import light_copy, slice_model
from ffprune.models.view import ModelView
from ffprune.stages.artifacts import read_json
from ffprune.stages.budget import BUDGETS, Budget
from ffprune.stages.environment import keep_memory
from ffprune.stages.params import load_params
from ffprune.stages.plan import meta_model
from ffprune.stages.record import CURVES, DENSE

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "shipped.json"
PREFILL, DECODE, ROUNDS, LOADS = 512, 16, 9, 5
BUDGET_ROUNDS = 25
"""More, since the same share of three budgets is compared, whose gains lie near to one another."""
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
SPARSITIES, STEPS, STEP = (0.2, 0.3, 0.5), (1, 8, 32, 64, 128), 32


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--project", type=Path, default=HERE.parent)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    chosen = parser.parse_args()
    if chosen.load:
        return _load(chosen.load)
    if not (chosen.project / CURVES).is_file():
        print(f"skipped: {chosen.project} has no {CURVES}; make run makes it", file=sys.stderr)
        return 0
    keep_memory()
    torch.set_float32_matmul_precision(load_params(chosen.project / "params.yaml").compute.matmul_precision)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for name, part in PARTS.items():
        if not chosen.parts or name in chosen.parts:
            measured = [{"part": name, **row} for row in part(chosen.project)]
            rows = [row for row in rows if row["part"] != name] + measured
            RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            for row in measured:
                print(f"{row['metric']}: {row['value']} ({row['low']} to {row['high']})", flush=True)
    return 0


def speed(project: Path) -> list[dict[str, Any]]:
    """Prefill and decode against the dense model, in both number formats."""
    losses = read_losses(project)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        dense = load_model(project / DENSE, dtype)
        policies = {f"{sparsity:.0%}": policy_of(dense, losses, sparsity) for sparsity in SPARSITIES}
        policies |= {f"step {step}": policy_of(dense, losses, 0.3, step) for step in STEPS}
        models = {"dense": dense} | {name: pruned(dense, policy) for name, policy in policies.items()}
        found = measure(models, PREFILL, DECODE, repeats=ROUNDS)
        for name, policy in policies.items():
            setting = f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, {name}"
            rows += _rows(name.replace(" ", "_"), found[name], 1 - macs(models[name]) / macs(dense), setting)
            loss = sum(float(c[k]) for c, k in zip(losses, policy.kept, strict=True))
            if name.startswith("step"):
                rows.append(row(f"predicted_loss_{name.replace(' ', '_')}", [loss], "report", setting))
    return rows


def large(project: Path) -> list[dict[str, Any]]:
    """Prefill and decode of a model of 1.2 billion random weights, all units cut alike, in bfloat16."""
    del project
    empty: Any = meta_model(AutoConfig.for_model("llama", **LARGE))
    dense: Any = empty.to(torch.bfloat16).to_empty(device="cpu").eval()
    for tensor in (*dense.parameters(), *dense.buffers()):
        tensor.requires_grad_(False).normal_(0, 0.02)
    units = ModelView(dense).units
    models = {"dense": dense}
    models |= {f"{s:.0%}": pruned(dense, uniform(units, s, Bounds(0.05, 1.0))) for s in SPARSITIES}
    found = measure(models, PREFILL, DECODE, repeats=ROUNDS)
    rows = []
    for name in list(models)[1:]:
        setting = f"bfloat16, {torch.get_num_threads()} threads, shape of Llama 3.2 1B, {name}"
        rows += _rows(f"1b_{name}", found[name], 1 - macs(models[name]) / macs(dense), setting)
    return rows


def budgets(project: Path) -> list[dict[str, Any]]:
    """Shares of the parameters, of the multiply-adds and of the latency: what of a prefill each takes away."""
    losses, widths = read_losses(project), load_params(project / "params.yaml").latency.widths
    dense = load_model(project / DENSE, torch.bfloat16)
    table = block_latencies(
        ModelView(light_copy(dense)), Probe("prefill", PREFILL, 1, widths, ROUNDS), lambda done, total: None
    )
    facts = {"context": (PREFILL + 1) // 2, "latency": {"times": [asdict(times) for times in table.times]}}
    models, told = {"dense": dense}, {}
    for sparsity in SPARSITIES:
        for name in BUDGETS:
            budget = Budget.on(ModelView(dense), facts | {"name": name})
            policy = dynamic_programming(budget.units, losses, sparsity, Bounds(0.05, 1.0), STEP)
            loss = sum(float(curve[kept]) for curve, kept in zip(losses, policy.kept, strict=True))
            models[f"{name}_{sparsity:.0%}"] = pruned(dense, policy)
            told[f"{name}_{sparsity:.0%}"] = budget.removed(policy) | {"predicted_loss": loss}
    found = measure(models, PREFILL, 1, repeats=BUDGET_ROUNDS)
    rows = []
    for name, shares in told.items():
        budget_name, asked = name.split("_")
        setting = f"bfloat16, {torch.get_num_threads()} threads, {asked} of {budget_name}, prefill of {PREFILL}"
        turns = f"{setting}, {BUDGET_ROUNDS} rounds in turns"
        saved = [1 - 1 / ratio for ratio in found[name].prefill_ratios]
        rows.append(row(f"time_saved_by_{name}", saved, "report", turns))
        gone = 1 - macs(models[name]) / macs(dense)
        gain = [share / gone for share in saved]
        rows.append(row(f"prefill_gain_share_by_{name}", gain, 0.9 if budget_name == "latency" else "report", turns))
        rows += [row(f"{what}_by_{name}", [share], "report", setting) for what, share in shares.items()]
    whole = table.sum_milliseconds / table.dense_milliseconds
    return [*rows, row("table_over_dense_layers", [whole], 1.0, f"{ROUNDS} rounds, {widths} widths")]


def read_losses(project: Path) -> list[Any]:
    """Loss curves, one a unit."""
    return [np.array(row["loss"]) for row in read_json(project / CURVES)]


def policy_of(dense: PreTrainedModel, losses: list[Any], sparsity: float, step: int = STEP) -> Allocation:
    """What dynamic programming would keep."""
    return dynamic_programming(ModelView(dense).units, losses, sparsity, Bounds(0.05, 1.0), step)


def pruned(dense: PreTrainedModel, policy: Allocation) -> PreTrainedModel:
    """The model with the policy's widths; which granules stay changes no time."""
    model = light_copy(dense)
    slice_model(ModelView(model), [torch.arange(kept) for kept in policy.kept])
    return model


def macs(model: PreTrainedModel) -> float:
    """Multiply-adds of a prefill for one token, which attends to half of the prompt on average; the head runs once."""
    view = ModelView(model)
    layers = sum(
        cost * unit.granules for cost, unit in zip(view.granule_macs((PREFILL + 1) // 2), view.units, strict=True)
    )
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return layers + float(head.weight.numel()) / PREFILL


def _rows(name: str, found: Speed, gone: float, setting: str) -> list[dict[str, Any]]:
    dtype = setting.split(",")[0]
    saved = [(1 - 1 / ratio) / gone for ratio in found.prefill_ratios]
    setting += f"; {gone:.4f} of the multiply-adds went; {ROUNDS} rounds in turns"
    return [
        row(f"prefill_gain_share_{name}_{dtype}", saved, 0.9, f"prefill of {PREFILL}, {setting}"),
        row(f"prefill_over_dense_{name}_{dtype}", found.prefill_ratios, "report", f"prefill of {PREFILL}, {setting}"),
        row(f"decode_over_dense_{name}_{dtype}", found.decode_ratios, "report", f"{DECODE} tokens, {setting}"),
    ]


def loading(project: Path) -> list[dict[str, Any]]:
    """Seconds and memory of a process that loads a folder and generates a token, against one that loads the dense."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        dense = load_model(project / DENSE, torch.bfloat16)
        losses = read_losses(project)
        folders = {"dense": Path(place) / "dense"}
        save_model(dense, None, folders["dense"])
        for sparsity in SPARSITIES:
            name = f"{sparsity:.0%}"
            folders[name] = Path(place) / name
            save_model(pruned(dense, policy_of(dense, losses, sparsity)), None, folders[name])
        turns = [{name: _loaded(folder) for name, folder in folders.items()} for _ in range(LOADS)]
    for name in list(folders)[1:]:
        for what in ("seconds", "memory"):
            ratios = [turn[name][what] / turn["dense"][what] for turn in turns]
            rows.append(row(f"load_{what}_over_dense_{name}", ratios, "report", f"bfloat16, {LOADS} fresh processes"))
    return rows


def gguf(project: Path) -> list[dict[str, Any]]:
    """Prefill, decode and file size in llama.cpp against the dense model's file, of the same number format."""
    dense = load_model(project / DENSE, torch.float32)
    losses, tokenizer = read_losses(project), load_tokenizer(project / DENSE)
    models = {"dense": dense} | {f"{s:.0%}": pruned(dense, policy_of(dense, losses, s)) for s in SPARSITIES}
    rows = []
    for kind in ("f16", "q8_0"):
        with tempfile.TemporaryDirectory() as place:
            files = {name: Path(place) / f"{name}.gguf" for name in models}
            for name, model in models.items():
                write_gguf(model, tokenizer, files[name], kind)
            size = {name: file.stat().st_size for name, file in files.items()}
            servers = {name: _server(file) for name, file in files.items()}
            # One turn to warm up.
            turns = [{name: _answer(server) for name, server in servers.items()} for _ in range(1 + ROUNDS)][1:]
        for name in list(models)[1:]:
            setting = f"{kind}, {torch.get_num_threads()} threads, xllamacpp {version('xllamacpp')}, {name}"
            for what, tokens in (("prefill", f"prefill of {PREFILL}"), ("decode", f"{DECODE} tokens")):
                ratios = [turn[name][what] / turn["dense"][what] for turn in turns]
                rows.append(row(f"{what}_over_dense_gguf_{name}_{kind}", ratios, "report", f"{tokens}, {setting}"))
                speeds = [turn[name][what] for turn in turns]
                rows.append(row(f"{what}_tokens_per_s_gguf_{name}_{kind}", speeds, "report", f"{tokens}, {setting}"))
            rows.append(row(f"bytes_over_dense_gguf_{name}_{kind}", [size[name] / size["dense"]], "report", setting))
    return rows


def _server(file: Path) -> Any:
    """llama.cpp's server, in this process."""
    import xllamacpp  # type: ignore[import-untyped]  # a compiled module

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(file), 2 * PREFILL, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    return xllamacpp.Server(params)


def _answer(server: Any) -> dict[str, float]:
    """Tokens a second, as llama.cpp times them."""
    prompt = [(97 * i) % 40_000 + 100 for i in range(PREFILL)]
    asked = {"prompt": prompt, "n_predict": DECODE, "ignore_eos": True, "cache_prompt": False, "temperature": -1.0}
    timed = server.handle_completions(asked)["timings"]
    return {"prefill": timed["prompt_per_second"], "decode": timed["predicted_per_second"]}


def _loaded(folder: Path) -> dict[str, float]:
    answer = subprocess.run([sys.executable, __file__, "--load", folder], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def _load(folder: Path) -> int:
    """In a process of its own: load, and let every weight be read once."""
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    model = load_model(folder, torch.bfloat16)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "memory": psutil.Process().memory_info().rss - before}))
    return 0


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "speed": speed,
    "large": large,
    "budgets": budgets,
    "loading": loading,
    "gguf": gguf,
}


if __name__ == "__main__":
    sys.exit(main())
