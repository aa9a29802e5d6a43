"""dvc.yaml and the stage records agree, and every module that a stage imports is a dependency."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import pytest

from ffprune.stages.params import read_yaml
from ffprune.stages.record import ENTRIES, FIGURES, MODEL_FOLDERS, STAGES, Stage, covers, maker_of
from ffprune.stages.registry import PULLED
from tests.stages.import_closure import SOURCE, closure
from tests.toy import REPO

PIPELINE: dict[str, Any] = read_yaml(REPO / "dvc.yaml")["stages"]


def names(entries: list[Any]) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def entry_of(stage: Stage) -> dict[str, Any]:
    entry: dict[str, Any] = PIPELINE[stage.name]
    if stage.each:
        assert entry["foreach"] == f"${{{stage.each}}}"
        return dict(entry["do"])
    return entry


each_stage = pytest.mark.parametrize("stage", (*STAGES, *ENTRIES), ids=lambda stage: stage.name)


def test_the_stages_are_the_same_in_the_same_order() -> None:
    assert list(PIPELINE) == [stage.name for stage in (*STAGES, *ENTRIES)]


@each_stage
def test_dvc_and_the_record_agree(stage: Stage) -> None:
    entry, kind = entry_of(stage), stage.name
    stage = stage.of("${key}") if stage.each else stage
    assert entry["cmd"] == f"${{ffprune}} {stage.name.replace('@', ' ')}"
    assert names(entry["params"]) == set(stage.params)
    data = {dep for dep in names(entry.get("deps", [])) if not dep.startswith("src/")}
    # What the entry itself says, by the way to it in params.yaml.
    data = {dep.replace("${item.", f"${{{PIPELINE[kind].get('foreach', '')[2:-1]}.${{key}}.") for dep in data}
    # A parameter of several texts stands for all of them; the project's own params.yaml names one.
    assert {"${study.texts}" if dep.startswith("${study.texts.") else dep for dep in data} == set(stage.deps)
    assert names(entry.get("outs", [])) == {*stage.outs, stage.run_record}
    assert names(entry.get("metrics", [])) == set(stage.metrics)
    assert names(entry.get("plots", [])) == set(stage.plots)


@each_stage
def test_every_module_behind_a_stage_is_a_dependency(stage: Stage) -> None:
    code = [dep.removeprefix("src/") for dep in entry_of(stage)["deps"] if dep.startswith("src/")]
    module = stage.function.partition(":")[0]
    # What a stage draws goes to MLflow; only for report is it an output.
    drawing = {str(file.relative_to(SOURCE)) for file in (SOURCE / "ffprune/stages/figures").glob("*.py")}
    behind = closure(module, frozenset() if FIGURES in stage.outs else frozenset(drawing))
    missing = {file for file in behind if not any(covers(dep, PurePath(file)) for dep in code)}
    assert not missing, f"add to the deps of '{stage.name}' in dvc.yaml: {sorted(missing)}"
    unused = {dep for dep in code if not any(covers(dep, PurePath(file)) for file in behind)}
    assert not unused, f"'{stage.name}' imports nothing of these; drop them from its deps: {sorted(unused)}"


def test_what_a_stage_reads_is_made_before_it() -> None:
    made: set[str] = set()
    for stage in STAGES:
        assert {dep for dep in stage.deps if not dep.startswith("${")} <= made, stage.name
        made |= set(stage.written)


def test_folders_of_models_that_stages_write_are_no_names_for_more_models() -> None:
    written = (out for stage in (*STAGES, *ENTRIES) for out in stage.outs if out.startswith("models/"))
    folders = {PurePath(out).parts[1] for out in written}
    assert folders - {"${key}"} == set(MODEL_FOLDERS) - {PULLED.name}


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("models/dense/config.json", "download"),
        ("models/small/config.json", "fetch@small"),
        ("metrics/models/small.json", "fetch@small"),
        ("models/repaired/0.2/searched+stream", "ridge"),
        ("models/methods/wanda-50", "method@wanda-50"),
        ("models/methods/dense", "method@dense"),
        ("metrics/methods/dense.json", "method@dense"),
        ("data/decisions/dense.json", "decide@dense"),
        ("models/methods", None),
        ("models/pulled/small-1", None),
        ("data/decisions/small.json", "decide@small"),
    ],
)
def test_the_maker_of_a_file_is_known(path: str, stage: str | None) -> None:
    assert maker_of(Path(path)) == stage
