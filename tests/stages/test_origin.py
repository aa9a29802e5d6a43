"""What a project knows of its models, and a folder of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.stages.origin import origin_of
from ffprune.stages.record import DENSE, REPAIRED, SUMMARY, facts_of

PLACE = f"{REPAIRED}/0.2/searched+stream"


class Project:
    """A folder with what a run leaves behind: a model, its policy, a lock, metrics."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for place in (PLACE, DENSE):
            (root / place).mkdir(parents=True)
            (root / place / "model.safetensors").write_bytes(b"x" * 100)
        model = {"name": "someone/tiny", "kind": "hub", "source": "someone/tiny", "revision": "abc", "parameters": 10}
        self.write("metrics/download.json", {"model": {**model, "license": "apache-2.0"}})
        facts = {"granularity": "structured", "budget": "macs", "sparsity_target": 0.2, "sparsity": 0.21}
        self.write(f"{PLACE}.json", {"method": "searched", **facts, "removed": {"macs": 0.2, "parameters": 0.21}})
        row = {"path": PLACE, "perplexity": 26.4, "bytes": 100}
        dense = {"path": DENSE, "perplexity": 19.5, "bytes": 100}
        self.write(SUMMARY, {"protocol": {"windows": 6}, "dense": dense, "rows": [row]})
        self.write("metrics/runs/ridge.json", {"run_id": "r1"})
        self.write("metrics/runs/evaluate.json", {"run_id": "e1"})
        self.lock: dict[str, Any] = {
            "download": {"params": {"params.yaml": {"model": {"trust_remote_code": False}}}, "outs": [self.out(DENSE)]},
            "ridge": {"params": {"params.yaml": {"ridge": {"damping": 0.01}}}, "outs": [self.out(REPAIRED)]},
            "evaluate": {"params": {"params.yaml": {"evaluate": {}}}, "deps": [self.out(DENSE), self.out(REPAIRED)]},
        }
        self.write_lock()

    @staticmethod
    def out(path: str, md5: str = "1") -> dict[str, str]:
        return {"path": path, "md5": md5}

    def write(self, name: str, value: object) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps(value))

    def write_lock(self) -> None:
        text = io.StringIO()
        YAML().dump({"stages": self.lock}, text)
        (self.root / "dvc.lock").write_text(text.getvalue())


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_a_model_of_a_project(project, monkeypatch) -> None:
    monkeypatch.chdir(project.root / "models")
    known = origin_of(Path("repaired/0.2/searched+stream"))
    assert known.name == "tiny-searched+stream-0.2"
    assert known.license == "apache-2.0"
    assert known.base_model == "someone/tiny"
    assert known.source["revision"] == "abc"
    assert dict(known.method) == {
        "policy": "searched",
        "repair": "stream",
        "granularity": "structured",
        "budget": "macs",
        "target": "0.2 of the budget",
        "sparsity": "0.2100 of the prunable weights",
        "macs removed": "20.00%",
        "parameters removed": "21.00%",
    }
    assert known.params == {"model": {"trust_remote_code": False}, "ridge": {"damping": 0.01}}
    assert known.results is not None
    assert known.results["row"]["perplexity"] == 26.4
    assert known.results["dense"]["perplexity"] == 19.5
    assert known.runs == {"ridge": "r1"}


def test_the_dense_model_of_a_project(project) -> None:
    known = origin_of(project.root / DENSE)
    assert known.name == "tiny"
    assert not known.method
    assert known.params == {"model": {"trust_remote_code": False}}
    assert known.results is not None
    assert known.results["row"]["perplexity"] == 19.5


def test_results_of_other_files_are_not_told(project) -> None:
    (project.root / PLACE / "model.safetensors").write_bytes(b"x" * 99)
    assert origin_of(project.root / PLACE).results is None
    assert origin_of(project.root / DENSE).results is not None
    project.lock["ridge"]["outs"] = [project.out(REPAIRED, "2")]
    project.write_lock()
    (project.root / PLACE / "model.safetensors").write_bytes(b"x" * 100)
    assert origin_of(project.root / PLACE).results is None


def test_what_a_project_does_not_have_is_left_out(project) -> None:
    for name in (SUMMARY, "metrics/download.json", f"{PLACE}.json"):
        (project.root / name).unlink()
    known = origin_of(project.root / PLACE)
    assert known.results is None
    assert known.license is None
    assert not known.source
    assert not known.method
    assert known.params["ridge"] == {"damping": 0.01}


def test_a_folder_elsewhere_tells_what_its_card_tells(project) -> None:
    folder = project.root / "elsewhere"
    folder.mkdir()
    assert origin_of(folder).license is None
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n# Tiny\n")
    known = origin_of(folder)
    assert (known.name, known.license, known.base_model) == ("elsewhere", "mit", "someone/tiny")
    assert known.results is None
    for text in ("no metadata", "---\n- a\n- list\n---\n", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n"):
        (folder / "README.md").write_text(text)
        assert origin_of(folder).license is None


def test_one_more_dense_model_of_a_project(project) -> None:
    (project.root / "models/other").mkdir()
    assert origin_of(project.root / "models/other").name == "other"
    project.write(facts_of("other"), {"model": {"name": "someone/other", "kind": "hub", "license": "mit"}})
    project.write("metrics/runs/fetch@other.json", {"run_id": "f1"})
    said = {"models.other": {"trust_remote_code": False}}
    project.lock["fetch@other"] = {"params": {"params.yaml": said}, "outs": [project.out("models/other")]}
    project.write_lock()
    known = origin_of(project.root / "models/other")
    assert (known.name, known.base_model, known.license) == ("other", "someone/other", "mit")
    assert known.params == said
    assert known.runs == {"fetch@other": "f1"}
    assert known.results is None
