"""The default pipeline, end to end: the real model and text through DVC, with budgets cut to minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workspace import Workspace

SMALL: dict[str, Any] = {
    "calibrate.windows": 16,
    "sensitivity.fisher.windows": 4,
    "sensitivity.hutchinson.probes": 2,
    "sensitivity.hutchinson.windows": 1,
    "sensitivity.hutchinson.batch_size": 1,
    "search.episodes": 8,
    "search.samples": 1,
    "search.final_samples": 2,
    "search.finalists": 1,
    "search.guide.imagined": 128,
    "search.guide.batch": 4,
    "search.guide.proposals": 1,
    "prune.policies": ["uniform", "searched"],
    "ridge.repairs": {"ridge": ["uniform", "searched"], "stream": ["searched"]},
    "ridge.stream.windows": 16,
    "ridge.stream.batch_size": 4,
    "evaluate.windows": 3,
    "evaluate.seqlen": 512,
    "evaluate.methods": ["uniform+ridge", "searched", "searched+ridge", "searched+stream"],
    "evaluate.speed.prefill_tokens": 16,
    "evaluate.speed.decode_tokens": 2,
    "evaluate.speed.repeats": 1,
    "evaluate.zero_shot.items": 2,
    "evaluate.zero_shot.methods": [],
}
RELOAD = """
import sys, ffprune
from pathlib import Path
from ffprune.evaluate.perplexity import perplexity
from ffprune.stages.inputs import sample_windows
import torch
torch.set_float32_matmul_precision("medium")
model = ffprune.load_model(sys.argv[1], torch.bfloat16)
windows = sample_windows(Path("models/dense"), Path("data/text/test.txt"), 512, 3, 0, "windows")
print(perplexity(model, windows, 4).value)
"""


@pytest.mark.slow
def test_the_default_pipeline(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.set(SMALL)
    order = work.stages_run()
    assert sorted(order) == sorted(
        [
            "download",
            "latency",
            "calibrate",
            "sensitivity",
            "levels",
            "search",
            "transfer",
            "prune",
            "ridge",
            "evaluate",
            "report",
        ]
    )

    # The model is the one it should be, and a search is worth its time even when it is this short.
    summary = work.summary
    assert 15 < summary["dense"]["perplexity"] < 25
    assert summary["dense"]["params"] == 134_515_008
    for sparsity in (0.2, 0.3):
        searched, uniform = work.row("searched+ridge", sparsity), work.row("uniform+ridge", sparsity)
        assert searched["perplexity"] < uniform["perplexity"]
        assert searched["perplexity"] < work.row("searched", sparsity)["perplexity"]
        # On so little text too, following the stream is the better repair.
        assert work.row("searched+stream", sparsity)["perplexity"] < searched["perplexity"]
        removed = 106_168_320 * sparsity
        # One FFN channel has three vectors of 576 weights.
        assert 0 <= 134_515_008 - searched["params"] - removed < 3 * 576
        assert searched["bytes"] < summary["dense"]["bytes"] * (1 - 0.7 * sparsity)

    # A new process reads the same model from the folder.
    row = work.row("searched+stream", 0.2)
    assert float(work.run("-c", RELOAD, row["path"])) == pytest.approx(row["perplexity"], abs=5e-5)

    # One run of the pipeline, one child a stage, curves and hashes inside.
    from mlflow import MlflowClient  # seconds, which collecting the fast tests need not take

    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("ffprune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    assert sorted(children) == sorted(order)
    assert len(client.get_metric_history(children["search"].info.run_id, "reward")) == 8
    assert any(key.startswith("input.models/dense") for key in children["search"].data.tags)
    assert {"policy.json", "policy.png"} <= {
        file.path for file in client.list_artifacts(children["search"].info.run_id)
    }

    # What a stage needs is known beforehand from the model's shape.
    from transformers import AutoConfig

    from ffprune.models.view import ModelView
    from ffprune.stages.costs import costs
    from ffprune.stages.params import load_params
    from ffprune.stages.plan import meta_model

    view = ModelView(meta_model(AutoConfig.from_pretrained(tmp_path / "models" / "dense")))
    for cost in costs(view, load_params(tmp_path / "params.yaml")):
        used = children[cost.stage].data.metrics["peak_memory_gb"]
        assert 0.6 < cost.memory / 1e9 / used < 1.6, (cost.stage, used)

    # Nothing changed, nothing runs; a change reaches what depends on it and no more.
    assert work.stages_run() == []
    work.set({"ridge.damping": 0.02})
    assert work.stages_run() == ["ridge", "evaluate", "report"]
    (tmp_path / "other.txt").write_text((tmp_path / "data" / "text" / "validation.txt").read_text())
    work.set({"evaluate.text": "other.txt"})
    assert work.stages_run() == ["evaluate", "report"]
    # An earlier state comes back from the cache.
    work.set({"evaluate.text": "data/text/test.txt", "ridge.damping": 0.01})
    assert work.stages_run() == []
    assert work.row("searched+stream", 0.2) == row
