"""Several models in one dvc.yaml: entries of `models`, recipes that name them, the table of them all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from ffprune.models.checkpoint import save_model
from ffprune.models.surgery import param_count
from ffprune.stages.context import StageContext
from ffprune.stages.editing import set_parameters
from ffprune.stages.params import load_params
from ffprune.stages.record import DECIDE, METHOD, facts_of
from ffprune.stages.registry import find_version
from ffprune.stages.tracking import open_store
from tests.stages.test_method_tiny import recipe
from tests.stages.test_study import project
from tests.stages.tiny_project import params
from tests.tiny import character_tokenizer, llama, spread
from tests.toy import REPO
from tests.workspace import environment

__all__ = ["project"]

MODELS = ("dense", "wide")
KINDS: dict[str, dict[str, Any]] = {
    "slice": {"criterion": "wanda_column", "repair": "ridge"},
    "mask": {"criterion": "wanda"},
}
#: A corner of each model's grid: a process a stage, and a test for every method are elsewhere.
GRID = (("dense", "slice", 0.2), ("dense", "mask", 0.4), ("wide", "slice", 0.4), ("wide", "mask", 0.2))


def wide(channels: int = 48) -> PreTrainedModel:
    """A Llama of another size than that of the project."""
    return llama(hidden_size=32, intermediate_size=channels, num_hidden_layers=3)


def entry(folder: Path) -> dict[str, Any]:
    """An entry of the section `models`."""
    return {"source": {"kind": "local", "path": str(folder)}, "trust_remote_code": False, "storage_dtype": "float32"}


def test_a_stage_of_a_recipe_reads_the_model_that_the_recipe_names() -> None:
    given = params(
        models={"wide": entry(Path("source/wide"))},
        methods={"a": recipe("none", 0.0), "b": recipe("none", 0.0, model="wide")},
    )
    for stage in (DECIDE, METHOD):
        assert "models/dense" in StageContext(stage.of("a"), given).deps
        deps = StageContext(stage.of("b"), given).deps
        assert "models/wide" in deps
        assert "models/dense" not in deps


@pytest.mark.slow
def test_a_grid_of_models_granularities_and_sparsities_runs_in_one_pipeline(
    project: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None], prefect_home: Path
) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True)
    (project / "src").symlink_to(REPO / "src")
    Path("data/zero_shot").mkdir(parents=True)
    with_database()
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.setenv("PATH", environment()["PATH"])
    for name, channels in (("wide", 48), ("wider", 64)):
        save_model(spread(wide(channels)), character_tokenizer(), Path("source") / name)
    grid = {f"{model}-itself": recipe("none", 0.0, model=model) for model in MODELS}
    for model, kind, sparsity in GRID:
        grid[f"{model}-{kind}-{100 * sparsity:g}"] = recipe(
            kind, sparsity, model=model, save=sparsity == 0.2, **KINDS[kind]
        )
    set_parameters({"models": {"wide": entry(Path("source/wide"))}, "methods": grid})
    stages = [f"{stage}@{name}" for stage in ("decide", "method") for name in grid]
    assert run(*(METHOD.of(name).name for name in grid)) == dict.fromkeys(
        ["download", "fetch@wide", *stages], "Completed"
    )

    results = {name: json.loads(Path(METHOD.of(name).metrics[0]).read_text()) for name in grid}
    sizes = {"dense": param_count(llama()), "wide": param_count(wide())}
    for name, result in results.items():
        assert result["recipe"]["model"] == name.partition("-")[0]
        assert result["params_before"] == sizes[result["recipe"]["model"]]
    known = json.loads(Path(facts_of("wide")).read_text())["model"]
    assert (known["name"], known["parameters"]) == ("wide", sizes["wide"])
    # Perplexities stand beside those of the same model, in the table as well.
    dense = {model: results[f"{model}-itself"]["perplexity"]["test"]["value"] for model in MODELS}
    assert dense["dense"] != dense["wide"]
    rows = json.loads(ffprune("table", "--json"))["methods"]
    assert [row["model"] for row in rows] == ["dense"] * 3 + ["wide"] * 3
    for row in rows:
        assert row["ratio_to_dense"] == pytest.approx(row["perplexity"] / dense[row["model"]])
        assert row["granularity"] == {"slice": "structured", "mask": "unstructured"}.get(
            row["method"].split("-")[1], "none"
        )
    assert len({row["perplexity"] for row in rows}) == 6
    assert ffprune("table").count(" uniform mask ") == 2

    store = open_store(load_params().tracking)
    tags = [run.data.tags for run in store.client.search_runs([store.experiment_id], "tags.dense = 'wide'")]
    assert {tag["ffprune.stage"] for tag in tags} == {METHOD.of(name).name for name in grid if name.startswith("wide")}
    assert {tag["model"] for tag in tags} == {"wide"}
    # A model that is kept is a colleague's to get, once its flow has ended.
    for model, name in (("model", "dense-slice-20"), ("wide", "wide-mask-20")):
        assert find_version(store, f"{model}@method-{name}").tags["method"] == name
        assert store.client.get_registered_model(model).aliases.keys() == {f"method-{name}"}

    # Another source of one model: what reads the others does not run again.
    set_parameters({"models.wide.source.path": "source/wider"})
    again = run(*(METHOD.of(f"{model}-itself").name for model in MODELS))
    assert {name for name, state in again.items() if state == "Completed"} == {
        *("fetch@wide", "decide@wide-itself", "method@wide-itself")
    }
    assert {name for name, state in again.items() if state == "Cached"} == {
        *("download", "decide@dense-itself", "method@dense-itself")
    }
    remade = json.loads(Path(METHOD.of("wide-itself").metrics[0]).read_text())
    assert remade["params_before"] == param_count(wide(64))
    assert "outputs compared" in ffprune("verify")


def ffprune(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "ffprune", *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(*stages: str) -> dict[str, str]:
    """What became of these stages and of those that they need."""
    return dict(
        re.findall(r"^(\S+): (Completed|Cached|Restored)", ffprune("run", "--workers", "2", *stages), re.MULTILINE)
    )
