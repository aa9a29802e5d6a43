"""Studies: what is written into them, and `ffprune reproduce` and `compare` as people type them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages import study
from ffprune.stages.artifacts import write_json
from ffprune.stages.editing import set_parameters
from ffprune.stages.exhibits.page import Rendered
from ffprune.stages.exhibits.papers import comparison_methods, exhibit
from ffprune.stages.params import load_params, read_yaml
from ffprune.stages.record import METHOD
from tests.stages.made_up import result
from tests.stages.tiny_project import defaults, write_sources
from tests.tiny import llama
from tests.toy import REPO, isolate, wait_until


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's own files without git, with a profile of a tiny local model; current."""
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / "flows", "flows", ignore=shutil.ignore_patterns("__pycache__"))
    values = defaults()
    root = str(tmp_path / "source")
    for section, name in (("model", "model"), ("data", "text.txt")):
        values[section]["source"]["path"] = f"{root}/{name}"
    yaml = YAML()
    with Path("params.yaml").open("w") as file:
        yaml.dump(values, file)
    Path("profiles").mkdir()
    with Path("profiles/tiny.yaml").open("w") as file:
        yaml.dump({section: values[section] for section in ("model", "data")}, file)
    write_sources(tmp_path, llama())
    return tmp_path


def files(folder: Path) -> dict[str, Any]:
    return {name: read_yaml(folder / name) for name in ("params.yaml", "dvc.yaml")}


def test_a_study_has_the_methods_of_what_was_asked_and_keeps_what_people_changed(project: Path) -> None:
    name, folder = study.open_study("tiny", exhibit("ms-table-1").recipes(False))
    assert (name, folder) == ("tiny", Path("studies/tiny"))
    first = files(folder)
    assert set(first["params.yaml"]["methods"]) == set(exhibit("ms-table-1").recipes(False))
    load_params(folder / "params.yaml")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("min_keep: 0.05", "min_keep: 0.07  # mine"))
    study.open_study("tiny", exhibit("ms-table-2").recipes(False))
    later = files(folder)
    assert later["params.yaml"]["study"]["min_keep"] == 0.07
    assert "# mine" in (folder / "params.yaml").read_text()
    assert set(later["params.yaml"]["methods"]) > set(first["params.yaml"]["methods"])
    assert later["dvc.yaml"] == first["dvc.yaml"]
    # A table that asks for more than perplexity adds to what is measured, and one that does not takes nothing away.
    for table in ("ms-table-3", "ms-table-2"):
        study.open_study("tiny", exhibit(table).recipes(False))
        asked = files(folder)["params.yaml"]["methods"]
        assert {name for name, recipe in asked.items() if recipe["zero_shot"]} == set(
            exhibit("ms-table-3").recipes(False)
        )


def test_a_studys_pipeline_finds_its_code_and_every_text(project: Path) -> None:
    made = YAML(typ="safe").load(study.pipeline((project / "dvc.yaml").read_text(), ["wikitext2", "ptb"]))
    assert list(made["stages"]) == list(study.STAGES)
    method = made["stages"]["method"]["do"]
    assert [dep for dep in method["deps"] if dep.startswith("${")] == [
        *("${study.texts.wikitext2}", "${study.texts.ptb}"),
        "${study.zero_shot.data}",
    ]
    for entry in made["stages"].values():
        code = [dep for dep in entry.get("do", entry)["deps"] if "src/" in dep]
        assert code
        assert all(dep.startswith("../../src/") for dep in code)
        assert all((REPO / dep.removeprefix("../../")).exists() for dep in code)


def test_studies_share_the_projects_documents_of_tasks(project: Path) -> None:
    recipes = exhibit("ms-table-1").recipes(False)
    _, folder = study.open_study("tiny", recipes)
    shared = Path("data/zero_shot")
    assert list(shared.iterdir()) == []  # made, since a method depends on it; the hub is asked then
    data = load_params(folder / "params.yaml").study.zero_shot.data
    assert (folder / data).resolve() == shared.resolve()
    method = files(folder)["dvc.yaml"]["stages"]["method"]["do"]
    assert "${study.zero_shot.data}" in method["deps"]
    # Later the study's own word counts, and an absolute path is as good in a study as in the project.
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace(data, "elsewhere"))
    study.open_study("tiny", recipes)
    assert load_params(folder / "params.yaml").study.zero_shot.data == "elsewhere"
    shutil.rmtree(folder)
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("data/zero_shot", "/far/away"))
    study.open_study("tiny", recipes)
    assert load_params(folder / "params.yaml").study.zero_shot.data == "/far/away"


def test_a_study_of_an_older_project_is_told_what_it_lacks(project: Path) -> None:
    recipes = exhibit("ms-table-1").recipes(False)
    _, folder = study.open_study("tiny", recipes)
    values = read_yaml(folder / "params.yaml")
    del values["models"], values["methods"]["dense"]["model"]
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    with pytest.raises(ParameterError, match=r"'models' is missing"):
        study.open_study("tiny", recipes)
    with pytest.raises(ParameterError, match=r"'methods\.dense\.model' is missing"):
        load_params(folder / "params.yaml")


def test_a_comparison_is_of_one_model(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = comparison_methods().recipes(False)["dense"]
    _, folder = study.open_study("tiny", {})
    other = {"models.other": defaults()["model"], "methods": {"dense": dense, "other": {**dense, "model": "other"}}}
    set_parameters(other, folder / "params.yaml")
    for name, entry in other["methods"].items():
        write_json(folder / METHOD.of(name).metrics[0], result(name, entry))
    shown: list[Rendered] = []
    monkeypatch.setattr(study, "_publish", lambda folder, name, page: shown.append(page))
    study.compare("tiny", full=False, show=True, workers=1)
    assert [row["method"] for row in shown[0].rows] == ["dense"]


def test_wrong_names_are_refused_with_those_there_are(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParameterError, match=r"ff-table-9.*ff-table-2"):
        study.reproduce_exhibit("ff-table-9", "tiny", full=False, show=False, workers=1)
    with pytest.raises(ParameterError, match="'gpt-5'.*tiny"):
        study.reproduce_exhibit("ms-table-1", "gpt-5", full=False, show=False, workers=1)
    assert not Path("studies").exists()
    monkeypatch.chdir(project / "profiles")
    with pytest.raises(MissingInput, match="profiles/"):
        study.compare("tiny", full=False, show=False, workers=1)


def ffprune(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ffprune", *words], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_table_is_made_once_and_shown_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None], prefect_home: Path
) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True)
    (project / "src").symlink_to(REPO / "src")
    with_database()
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    recipes = exhibit("ms-table-1").recipes(False)
    first = ffprune("reproduce", "ms-table-1", "--model", "tiny", "--workers", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    done = dict(re.findall(r"^method@(\S+): (\w+)", first.stdout, flags=re.MULTILINE))
    assert done == dict.fromkeys(recipes, "Completed")
    assert re.findall(r"^decide@(\S+): Completed", first.stdout, flags=re.MULTILINE)
    assert "Printed in the paper" in first.stdout
    folder = project / "studies" / "tiny"
    page = (folder / "reports" / "ms-table-1.md").read_text()
    for name in recipes:
        result = json.loads((folder / "metrics" / "methods" / f"{name}.json").read_text())
        value = result["perplexity"]["test"]["value"]
        assert result["recipe"]["compressor"] == "none" or f"{value:.2f}" in page, name
    assert (folder / "reports" / "ms-table-1.png").stat().st_size > 1000
    assert (folder / "reports" / "ms-table-1.csv").is_file()
    again = ffprune("reproduce", "ms-table-1", "--model", "tiny")
    assert dict(re.findall(r"^method@(\S+): (\w+)", again.stdout, flags=re.MULTILINE)) == dict.fromkeys(
        recipes, "Cached"
    )
    # The comparison shows what the study has, without running what it lacks.
    shown = ffprune("compare", "--model", "tiny", "--show")
    assert shown.returncode == 0, shown.stderr
    assert "Unstructured, 50% sparsity" in shown.stdout
    assert not (project / "studies" / "tiny" / "mlruns").exists()


FLOW = """#!/bin/sh
trap 'sleep 1; echo ended > ended; exit 143' TERM INT
touch began
while :; do sleep 0.1; done
"""
RUNNING = """
import signal, sys
from pathlib import Path
from ffprune.stages import study
from ffprune.stages.lifeline import leave_on_sigterm
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background ignores it
leave_on_sigterm()
sys.executable = sys.argv[1]
study._run(Path.cwd(), "a run", 1, 1, [])
"""


@pytest.mark.parametrize("to_group", [False, True])
def test_a_run_that_is_stopped_lets_its_flow_end_in_order(tmp_path: Path, to_group: bool) -> None:
    """By SIGTERM to it alone, or by a terminal's Ctrl-C, which reaches the flow too."""
    flow = tmp_path / "flow"
    flow.write_text(FLOW)
    flow.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", RUNNING, flow],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            assert wait_until(lambda: (tmp_path / "began").exists(), 60)
            if to_group:
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.terminate()
            assert process.wait(20) == (-signal.SIGINT if to_group else 143)
        finally:
            with contextlib.suppress(ProcessLookupError):  # else the test would wait for it
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "ended").exists()
