"""Versions that point to DVC's store: what is registered, which alias moves, and what a colleague gets."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffprune.core.errors import ChecksumMismatch, MissingInput, ParameterError
from ffprune.stages.artifacts import read_json, write_json
from ffprune.stages.editing import set_parameters
from ffprune.stages.registering import register_if_any, register_models
from ffprune.stages.registry import NotShared, Pointer, find_version, pull_model
from ffprune.stages.sections import Tracking
from ffprune.stages.tracking import Store, open_store
from tests.stages.made_up import result
from tests.stages.test_method_tiny import recipe
from tests.toy import DVC, make_repo

PIPELINE = """
stages:
  ridge: {cmd: "mkdir -p models/repaired && cp -r made/. models/repaired", deps: [made], outs: [models/repaired]}
  evaluate: {cmd: "cp scores out.txt", deps: [models/repaired, data/text/test.txt, scores], outs: [out.txt]}
"""


def row(method: str, target: float, perplexity: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "granularity": "structured",
        "budget": "parameters",
        "sparsity_target": target,
        "sparsity": target,
        "perplexity": perplexity,
        "dense_perplexity": 10.0,
        "params": 5,
        "bytes": 10,
        "path": f"models/repaired/{target:g}/{method}",
        **changes,
    }


ROWS = [row("a", 0.2, 15.0), row("b", 0.2, 12.0), row("a", 0.125, None), row("b", 0.125, 11.0)]


def measured(
    rows: list[dict[str, Any]], dtype: str = "bfloat16", weights: str = "1", text: str = "data/text/test.txt"
) -> None:
    """A project whose models were made by DVC and measured."""
    protocol = {"text": text, "windows": 1, "tokens": 1000, "dtype": dtype, "seed": 0}
    write_json(Path("metrics/summary.json"), {"protocol": protocol, "dense": {}, "rows": rows})
    write_json(Path("metrics/download.json"), {"model": {"name": "someone/Small-1"}})
    shutil.rmtree("made", ignore_errors=True)
    for one in rows:
        folder = Path("made") / Path(one["path"]).relative_to("models/repaired")
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"{one['path']} {weights}")
        (folder / "config.json").write_text("{}")
    Path("data/text").mkdir(parents=True, exist_ok=True)
    Path("data/text/test.txt").write_text("text")
    Path("scores").write_text(json.dumps(rows))
    subprocess.run([*DVC, "repro", "-q"], check=True)


def kept(name: str, perplexity: float, weights: str, save: bool = True) -> None:
    """A method that DVC has run, which keeps its model or does not."""
    folder, file = Path("models/methods") / name, Path("metrics/methods") / f"{name}.json"
    Path("dvc.yaml").write_text(
        PIPELINE
        + f"""
  method:
    foreach: [{name}]
    do: {{cmd: "true", deps: [result], outs: [{folder}], metrics: [{{{file}: {{cache: false}}}}]}}
"""
    )
    entry = recipe("mask", 0.5, criterion="wanda", save=save)
    set_parameters({"methods": {name: entry}})
    found = {"value": perplexity, "stderr": 0.1, "windows": 4, "seqlen": 24, "tokens": 92}
    made = result(name, entry, perplexity={"test": found}, dtype="float32", seed=0)
    for path in (file, Path("result")):
        write_json(path, made)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    subprocess.run([*DVC, "commit", "-q", "--force", f"method@{name}"], check=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None]) -> Store:
    project = tmp_path / "first project"
    project.mkdir()
    make_repo(project, monkeypatch, PIPELINE)
    with_database()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    return open_store(Tracking(experiment="test", uri=None))


def aliases(store: Store) -> dict[str, str]:
    found = store.client.get_registered_model("Small-1").aliases
    return {name: str(version) for name, version in found.items()}


def test_a_pointer_reads_back_and_foreign_ones_are_refused() -> None:
    pointer = Pointer("models/repaired/0.2/searched+stream", "models/repaired", 32 * "a" + ".dir")
    assert Pointer.parse(str(pointer)) == pointer
    sha = 32 * "a"
    for source in (
        "s3://bucket/model",
        "dvc://models/repaired",
        f"dvc://models/a?out=models/b&md5={sha}",
        f"dvc://models/../../etc?out=models&md5={sha}",
        f"dvc:///etc/x?out=/etc&md5={sha}",
        "dvc://models/a?out=models&md5=../../x",
    ):
        with pytest.raises(ParameterError, match="points to"):
            Pointer.parse(source)


@pytest.mark.slow
def test_the_best_of_every_sparsity_is_registered_once(store: Store) -> None:
    measured(ROWS)
    first = register_models(store)
    assert [found.aliases for found in first] == [("best-20", "best"), ("best-12_5",)]
    assert all(found.new for found in first)
    version = store.client.get_model_version_by_alias("Small-1", "best-20")
    assert (version.tags["method"], version.tags["ratio_to_dense"]) == ("b", "1.20000")
    assert Pointer.parse(version.source).path == "models/repaired/0.2/b"
    assert [found.new for found in register_models(store)] == [False, False]


@pytest.mark.slow
def test_an_alias_moves_to_what_is_better_or_measured_otherwise(store: Store) -> None:
    measured([row("b", 0.2, 12.0)])
    register_models(store)
    measured([row("b", 0.2, 13.0)], weights="worse")
    (worse,) = register_models(store)
    assert (worse.version, worse.aliases, aliases(store)["best-20"]) == ("2", (), "1")
    measured([row("b", 0.2, 11.0)], weights="better")
    assert register_models(store)[0].aliases == ("best-20", "best")
    measured([row("b", 0.2, 14.0)], dtype="float32", weights="worse")
    assert register_models(store)[0].aliases == ("best-20", "best")
    measured([row("b", 0.2, 19.0, budget="macs")])
    assert register_models(store)[0].aliases == ("best-20-macs", "best")
    assert aliases(store) == {"best-20": "4", "best-20-macs": "5", "best": "5"}


@pytest.mark.slow
def test_another_text_under_the_same_name_is_another_measurement(store: Store) -> None:
    Path("dvc.yaml").write_text(PIPELINE.replace("data/text/test.txt", "mine.txt"))
    for content, perplexity in (("one text", 12.0), ("another, harder one", 13.0)):
        Path("mine.txt").write_text(content)
        measured([row("b", 0.2, perplexity)], text="mine.txt")
        (found,) = register_models(store)
        assert found.aliases == ("best-20", "best")


@pytest.mark.slow
def test_models_that_were_made_anew_since_are_not_registered(store: Store) -> None:
    measured(ROWS)
    Path("made/0.2/b/model.safetensors").write_text("other")
    subprocess.run([*DVC, "repro", "-q", "--single-item", "ridge"], check=True)
    with pytest.raises(MissingInput, match="made anew since they were measured"):
        register_models(store)
    register_if_any(store)
    assert store.client.search_registered_models() == []


@pytest.mark.slow
def test_a_colleague_gets_the_registered_files_or_a_reason(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    measured(ROWS)
    register_models(store)
    remote = tmp_path / "remote"
    remote.mkdir()
    other = tmp_path / "second project"
    other.mkdir()
    for project in (other, Path.cwd()):
        if project == other:
            make_repo(project, monkeypatch, PIPELINE)
        subprocess.run([*DVC, "remote", "add", "-q", "-d", "store", str(remote)], check=True, cwd=project)
    with pytest.raises(NotShared, match="Run 'dvc push' where it was made"):
        pull_model(store, "Small-1@best-20", None)
    assert capfd.readouterr().err, "DVC said why"
    subprocess.run([*DVC, "push", "-q"], check=True, cwd=tmp_path / "first project")
    got = pull_model(store, "Small-1@best-20", None)
    assert got == Path("models/pulled/Small-1-1")
    assert sorted(path.name for path in got.iterdir()) == ["config.json", "model.safetensors"]
    assert (got / "model.safetensors").read_text() == "models/repaired/0.2/b 1"
    assert pull_model(store, "Small-1@2", Path("mine")) == Path("mine")
    with pytest.raises(ParameterError, match="that exists"):
        pull_model(store, "Small-1@2", Path("mine"))
    assert not list(Path.cwd().glob("pulling-*"))


@pytest.mark.slow
def test_damaged_files_are_not_handed_out(store: Store, tmp_path: Path) -> None:
    measured(ROWS)
    register_models(store)
    for file in Path(".dvc/cache").rglob("*"):
        if file.is_file() and file.read_bytes().startswith(b"models/repaired/0.2/b"):
            file.chmod(0o644)
            file.write_text("models/repaired/0.2/b 2")
    with pytest.raises((ChecksumMismatch, NotShared)):
        pull_model(store, "Small-1@best", Path("mine"))
    assert not Path("mine").exists()
    assert not list(Path.cwd().glob("pulling-*"))


@pytest.mark.slow
def test_unknown_names_and_versions_list_the_known_ones(store: Store) -> None:
    measured(ROWS)
    register_models(store)
    for asked, known in (
        ("Large@best", "Small-1"),
        ("Small-1@best-50", "best, best-12_5, best-20"),
        ("best", "Small-1"),
    ):
        with pytest.raises(ParameterError, match=known):
            find_version(store, asked)


@pytest.mark.slow
def test_a_method_that_keeps_its_model_is_registered_under_its_own_name(store: Store) -> None:
    measured([row("b", 0.2, 12.0)])
    kept("masked", 15.0, "first", save=False)
    assert [found.aliases for found in register_models(store)] == [("best-20", "best")]
    kept("masked", 15.0, "first")
    _, first = register_models(store)
    assert (first.aliases, first.new) == (("method-masked",), True)
    version = find_version(store, "Small-1@method-masked")
    assert (version.tags["method"], version.tags["sparsity_target"], version.tags["bytes"]) == ("masked", "0.5", "5")
    assert "ratio_to_dense" not in version.tags  # no dense model was measured beside it
    assert (pull_model(store, "Small-1@method-masked", Path("mine")) / "model.safetensors").read_text() == "first"
    # Its alias is that of what is here, better or not; the best of the pipeline keeps its own.
    kept("masked", 16.0, "second")
    assert [found.new for found in register_models(store)] == [False, True]
    assert aliases(store) == {"best": "1", "best-20": "1", "method-masked": "3"}
    # What DVC does not know yet is none.
    write_json(Path("metrics/methods/masked.json"), {**read_json(Path("result")), "seed": 1})
    assert len(register_models(store)) == 1


@pytest.mark.slow
def test_a_project_of_methods_alone_is_registered_too(store: Store) -> None:
    measured([row("b", 0.2, 12.0)])
    Path("metrics/summary.json").unlink()
    with pytest.raises(MissingInput):
        register_models(store)
    kept("masked", 15.0, "first")
    assert [found.aliases for found in register_models(store)] == [("method-masked",)]
