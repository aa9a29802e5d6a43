"""What a project knows of its models, and a folder of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.cut import FLUCTUATION, REPAIRS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.importance import CRITERIA
from ffprune.core.saliency import SALIENCIES
from ffprune.stages import wording
from ffprune.stages.lineage import content_key
from ffprune.stages.origin import origin_of
from ffprune.stages.record import DENSE, METHOD, PRUNED, REPAIRED, SUMMARY, facts_of

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
        protocol = {"windows": 6, "seqlen": 100, "text": "data/text/test.txt"}
        self.write(SUMMARY, {"protocol": protocol, "dense": dense, "rows": [row]})
        self.write("metrics/runs/ridge.json", {"run_id": "r1", "version.ffprune": "0.0.9"})
        self.write("metrics/runs/evaluate.json", {"run_id": "e1"})
        self.lock: dict[str, Any] = {
            "download": {"params": {"params.yaml": {"model": {"trust_remote_code": False}}}, "outs": [self.out(DENSE)]},
            "latency": {"params": {"params.yaml": {"search.budget": "parameters"}}},
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
        "policy": "searched: how much of every layer goes was searched, by trials of really pruned models on "
        "validation text",
        "repair": "stream: ridge regression block by block, behind what was cut before, towards the dense model's "
        "residual stream",
        "granularity": "structured",
        "budget": "macs",
        "target": "0.2 of the budget",
        "sparsity": "0.2100 of the prunable weights",
        "macs removed": "20.00%",
        "parameters removed": "21.00%",
    }
    assert known.params == {
        "model": {"trust_remote_code": False},
        "search": {"budget": "parameters"},
        "ridge": {"damping": 0.01},
    }
    assert known.results is not None
    assert known.results["row"]["perplexity"] == 26.4
    assert known.results["dense"]["perplexity"] == 19.5
    assert known.runs == {"ridge": "r1"}
    assert known.version == "0.0.9"
    assert known.data == ["Tested on 6 windows of 100 tokens (600 tokens) of `data/text/test.txt`."]


TEXT = {
    "source": {"kind": "local", "path": "text.txt"},
    "format": "plain",
    "shares": {"calibration": 0.4, "validation": 0.2, "test": 0.4},
}


def test_what_a_model_was_made_on_is_told_in_words(project) -> None:
    project.lock["download"]["params"]["params.yaml"]["data"] = TEXT
    sections = {
        "calibrate": {"windows": 64, "seqlen": 512},
        "sensitivity": {"criterion": "compensated_elimination", "plain_criterion": "activation_norm"},
        "search": {"budget": "macs", "seqlen": 512, "samples": 2, "final_samples": 16},
        "prune": {"units": {"heads": "query"}},
        "ridge": {"stream": {"windows": 8, "seqlen": 100}},
    }
    for name, section in sections.items():
        said = section if name == "prune" else {name: section}
        project.lock[name] = {**project.lock.get(name, {}), "params": {"params.yaml": said}}
    project.write_lock()
    known = origin_of(project.root / PLACE)
    assert known.data == [
        "Text: the local path text.txt. Whole documents of it are 40% calibration, 20% validation, 40% test.",
        "Calibrated on 64 windows of 512 tokens (32,768 tokens) of the calibration text.",
        "The repair read 8 windows of 100 tokens (800 tokens) of the calibration text.",
        "A trial of the search read 2 windows of 512 tokens (1,024 tokens) of the validation text at most, the "
        "final comparison 16 other windows.",
        "Tested on 6 windows of 100 tokens (600 tokens) of `data/text/test.txt`.",
    ]
    assert known.method["criterion"].startswith("compensated_elimination: what the others make up for best")
    assert known.method["what goes"].startswith("query heads, as many of every")
    assert known.params["search"] == sections["search"]
    assert not any("." in name for name in known.params)
    plain = project.root / PRUNED / "0.2/uniform"
    plain.mkdir(parents=True)
    project.write(f"{PRUNED}/0.2/uniform.json", {"granularity": "structured", "sparsity_target": 0.2, "sparsity": 0.2})
    known = origin_of(plain)
    assert known.data[1:] == ["Calibrated on 64 windows of 512 tokens (32,768 tokens) of the calibration text."]
    assert known.method["policy"].startswith("uniform: the same share of every layer's attention and FFN")
    assert known.method["repair"] == "none: the cut stays as it is"
    assert known.method["criterion"].startswith("activation_norm")


def test_three_texts_are_told_one_by_one(project) -> None:
    hub = {"kind": "hub", "id": "a/b", "config": "raw"}
    source = {"kind": "splits", **{name: {**hub, "split": name} for name in ("calibration", "validation", "test")}}
    project.lock["download"]["params"]["params.yaml"]["data"] = {"source": source, "format": "plain"}
    project.write_lock()
    first = origin_of(project.root / PLACE).data[0]
    assert first == "Calibration text: a/b@main on the Hugging Face hub, config raw, split calibration."


def test_the_dense_model_of_a_project(project) -> None:
    known = origin_of(project.root / DENSE)
    assert known.name == "tiny"
    assert known.method == {"pruning": "none"}
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
    assert known.params == {"models": {"other": {"trust_remote_code": False}}}
    assert known.method == {"pruning": "none"}
    assert known.runs == {"fetch@other": "f1"}
    assert known.results is None


RECIPE = {
    "label": "FastForward at 40%",
    "model": "dense",
    "sparsity": 0.4,
    "allocator": "fastforward",
    "compressor": "slice",
    "criterion": "wanda_column",
    "repair": "ridge",
    "pattern": None,
    "calibration_windows": None,
    "quantize": None,
    "trials": 16,
}


class Method:
    """A recipe of a project that kept its model: its folder, its result, its entries in the lock."""

    def __init__(self, project: Project, name: str = "ff-40", **changes: Any) -> None:
        self.project, self.name = project, name
        self.stage = METHOD.of(name)
        self.recipe = {**RECIPE, **changes}
        self.folder = project.root / self.stage.outs[0]
        self.folder.mkdir(parents=True)
        (self.folder / "model.safetensors").write_bytes(b"x" * 80)
        self.params = {
            f"methods.{name}": self.recipe,
            "study.calibration": {"windows": 32, "seqlen": 1024},
            "study.texts": {"test": "data/text/test.txt"},
            "seed": 0,
        }
        self.write(26.4)

    def write(self, perplexity: float | None) -> None:
        found = {"value": perplexity, "stderr": 0.1, "windows": 4, "seqlen": 24, "tokens": 92}
        result = {
            "recipe": self.recipe,
            "granularity": "structured",
            "sparsity": 0.4012,
            "perplexity": {"test": found},
            "dtype": "float32",
            "seed": 0,
            "params_before": 1000,
            "params_after": 700,
            "zero_shot": {},
            "speed": {},
        }
        file = self.stage.metrics[0]
        self.project.write(file, result)
        self.project.write(self.stage.run_record, {"run_id": "m1", "version.ffprune": "0.0.9"})
        outs = [{**self.project.out(self.stage.outs[0]), "size": 80}]
        outs.append(self.project.out(file, content_key(self.project.root / file)))
        search = {"study.search": {"seqlen": 512, "samples": 2, "final_samples": 8}}
        decided = {**search, f"methods.{self.name}.trials": 16}
        self.project.lock[f"decide@{self.name}"] = {"params": {"params.yaml": decided}}
        self.project.lock[self.stage.name] = {"params": {"params.yaml": self.params}, "outs": outs}
        self.project.write_lock()


def test_a_model_that_a_recipe_kept(project) -> None:
    method = Method(project)
    known = origin_of(method.folder)
    assert known.name == "tiny-ff-40-0.4"
    assert (known.license, known.base_model, known.source["revision"]) == ("apache-2.0", "someone/tiny", "abc")
    assert dict(known.method) == {
        "recipe": "ff-40: FastForward at 40%",
        "compressor": "slice: tensors become smaller (FastForward Pruning, SparsitySolver)",
        "allocation": "fastforward: searched by PPO (FastForward Pruning)",
        "criterion": "wanda_column: what has small weights times norms of inputs goes first (FastForward Pruning)",
        "repair": "ridge: ridge regression fits the last linear map of every unit that was cut anew, to the unit's own "
        "output (FastForward Pruning, SparsitySolver)",
        "trials": "16",
        "target": "0.4 of the prunable weights",
        "sparsity": "0.4012 of the prunable weights",
        "granularity": "structured",
    }
    assert known.data == [
        "Calibrated on 32 windows of 1,024 tokens (32,768 tokens) of the calibration text.",
        "A trial of the search read 2 windows of 512 tokens (1,024 tokens) of the validation text at most, the "
        "final comparison 8 other windows.",
        "Tested on 4 windows of 24 tokens (96 tokens) of `data/text/test.txt`.",
    ]
    assert known.params["methods"] == {"ff-40": RECIPE}
    assert set(known.params["study"]) == {"search", "calibration", "texts"}
    assert known.results is not None
    (text,) = known.results["texts"]
    assert (text["perplexity"], text["dense"]) == (26.4, None)
    assert known.runs == {"method@ff-40": "m1"}
    assert known.version == "0.0.9"


def test_a_dense_model_measured_as_the_recipe_was_stands_beside_it(project) -> None:
    method = Method(project)
    Method(project, "dense", compressor="none", allocator="uniform", sparsity=0.0).write(19.5)
    found = origin_of(method.folder).results
    assert found is not None
    assert found["texts"][0]["dense"] == 19.5
    whole = origin_of(project.root / "models/methods/dense")
    assert whole.name == "tiny-dense"
    assert set(whole.method) == {"recipe", "compressor"}
    Method(project, "dense-elsewhere", compressor="none", model="other").write(10.0)
    (project.root / METHOD.of("dense").metrics[0]).unlink()
    found = origin_of(method.folder).results
    assert found is not None
    assert found["texts"][0]["dense"] is None


def test_a_recipe_of_another_model_tells_that_one(project) -> None:
    project.write(facts_of("other"), {"model": {"name": "someone/other", "kind": "hub", "license": "mit"}})
    project.lock["fetch@other"] = {"params": {"params.yaml": {"models.other": {"storage_dtype": "float16"}}}}
    known = origin_of(Method(project, model="other").folder)
    assert (known.name, known.license, known.base_model) == ("other-ff-40-0.4", "mit", "someone/other")
    assert known.params["models"] == {"other": {"storage_dtype": "float16"}}
    assert "model" not in known.params


def test_a_rounded_model_says_so_and_an_unknown_name_stays_a_name(project) -> None:
    quantize = {"bits": 4, "group_size": 8}
    method = Method(project, compressor="none", quantize=quantize, sparsity=0.0, allocator="uniform", trials=None)
    assert origin_of(method.folder).method["quantisation"] == "GPTQ, 4 bits in groups of 8"
    assert origin_of(Method(project, "old", allocator="gone").folder).method["allocation"] == "gone"


def test_results_of_a_recipe_are_those_of_its_files(project) -> None:
    method = Method(project)
    (method.folder / "model.safetensors").write_bytes(b"x" * 81)
    assert origin_of(method.folder).results is None
    (method.folder / "model.safetensors").write_bytes(b"x" * 80)
    assert origin_of(method.folder).results is not None
    file = project.root / method.stage.metrics[0]
    file.write_text(file.read_text().replace("26.4", "26.3"))
    known = origin_of(method.folder)
    assert known.results is None
    assert known.method["recipe"].startswith("ff-40")
    file.unlink()
    known = origin_of(method.folder)
    assert not known.method
    assert known.license == "apache-2.0"


def test_every_name_of_a_recipe_is_told_in_words() -> None:
    assert set(wording._ALLOCATIONS) == set(ALLOCATORS)
    assert set(wording._COMPRESSORS) == set(COMPRESSORS)
    assert set(wording._REPAIRS) == set(REPAIRS)
    assert set(wording._CRITERIA) == {*CRITERIA, *SALIENCIES, FLUCTUATION}
