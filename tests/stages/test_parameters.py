"""The reference of parameters says what params.yaml, the types and the stage records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffprune.core.errors import ParameterError
from ffprune.stages.parameters import Parameter, parameters, print_parameters, reference
from tests.stages.test_recipes import PLAIN
from tests.toy import REPO


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def named(key: str) -> Parameter:
    return next(parameter for parameter in parameters() if parameter.key == key)


def test_the_page_in_the_documentation_is_up_to_date() -> None:
    page = Path("docs/parameters.md").read_text()
    assert page == reference(parameters()), "run: ffprune params list --markdown > docs/parameters.md"


def test_every_parameter_has_its_meaning() -> None:
    # Those of a source, of shares and of repairs are explained once, above the first or at their section.
    explained = ("model.source.", "data.", "ridge.repairs.", "search.guide.", "study.")
    silent = [p.key for p in parameters() if not p.meaning and p.type != "section"]
    assert [key for key in silent if not key.startswith(explained)] == []


def test_types_bounds_choices_and_readers_are_told() -> None:
    assert named("seed").value == 0
    assert named("seed").type == "integer >= 0"
    assert named("compute.device_map").type == "auto or null"
    assert named("model.source.kind").type == "hub, local, pypi"
    assert named("prune.policies").type.startswith("list of ")
    assert named("search.budget").stages == ("latency", "search", "transfer", "report")
    assert named("workers.count").stages == ()
    assert named("study.damping").stages == ("decide@NAME", "method@NAME")
    assert "stream: block by block" in named("ridge.repairs").meaning


def test_a_part_is_shown_for_people_and_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    found = parameters(below=["report", "ridge.stream"])
    assert [p.key for p in found] == [
        *("ridge.stream", "ridge.stream.windows", "ridge.stream.seqlen", "ridge.stream.batch_size"),
        *("report", "report.dpi"),
    ]
    print_parameters(found, as_json=True, as_markdown=False)
    assert json.loads(capsys.readouterr().out)[1]["value"] == 64
    print_parameters(found, as_json=False, as_markdown=False)
    assert "ridge.stream.windows = 64  [integer >= 1]" in capsys.readouterr().out


def test_an_unknown_key_lists_the_sections() -> None:
    with pytest.raises(ParameterError, match="sections are seed, compute"):
        parameters(below=["nothing"])


def test_entries_with_names_of_ones_own_are_told_and_what_an_anchor_brings_along(tmp_path: Path) -> None:
    text = Path("params.yaml").read_text()
    recipe = "\n".join(f"    {key}: {json.dumps(value)}" for key, value in PLAIN.items())
    source = "models:\n  mine:\n    source:\n      kind: local\n      path: ~/mine  # of mine\n"
    text = text.replace("models: {}\n", source)
    text = text.replace("methods: {}\n", f"methods:\n  one: &one\n{recipe}\n  two: {{<<: *one, model: mine}}\n")
    (tmp_path / "params.yaml").write_text(text)
    found = {p.key: p for p in parameters(tmp_path / "params.yaml", ["models", "methods"])}
    path = found["models.mine.source.path"]
    assert (path.type, path.meaning, path.stages) == ("text length >= 1", "of mine", ("fetch@NAME",))
    model, speed = found["methods.two.model"], found["methods.two.speed"]
    assert (model.value, model.stages) == ("mine", ("decide@NAME", "method@NAME"))
    assert (speed.type, speed.meaning, speed.stages) == ("true, false", "", ("method@NAME",))
