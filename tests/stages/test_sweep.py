"""Sweeps: which recipes they are made of, what is refused, and the table over several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.core.errors import ParameterError
from ffprune.stages import sweep
from ffprune.stages.exhibits.papers import comparison_methods
from ffprune.stages.exhibits.sweeping import sweep_recipes
from ffprune.stages.params import read_yaml
from ffprune.stages.record import METHOD
from ffprune.stages.study import STAGES
from tests.stages.test_study import project

__all__ = ["project"]


def test_every_named_method_at_every_sparsity_and_the_dense_model() -> None:
    found = sweep_recipes(["unstructured"], [0.2, 0.35], ["wanda", "owl"], full=False)
    assert set(found) == {"dense", "wanda-20", "wanda-35", "owl-20", "owl-35"}
    assert found["owl-35"]["sparsity"] == 0.35
    assert found["owl-35"]["allocator"] == "owl"


def test_a_pattern_has_its_own_sparsity() -> None:
    found = sweep_recipes(["2:4", "unstructured"], [0.3], ["sparsegpt"], full=False)
    assert set(found) == {"dense", "sparsegpt-30", "sparsegpt-50-2of4"}
    assert found["sparsegpt-50-2of4"]["pattern"] == "2:4"


def test_without_methods_and_sparsities_a_sweep_is_the_short_comparison() -> None:
    both = sweep_recipes(["structured", "unstructured"], [], [], full=False)
    assert both == comparison_methods().recipes(full=False)


def test_searched_methods_get_the_trials_of_the_variant() -> None:
    short, full = (sweep_recipes(["structured"], [0.2], ["fastforward-ridge"], full) for full in (False, True))
    assert "fastforward-ridge-20-t45" in short
    assert "fastforward-ridge-20-t240" in full


def test_wrong_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ParameterError, match=r"'1:2'.*2:4, 4:8, structured, unstructured"):
        sweep_recipes(["1:2"], [], [], full=False)
    with pytest.raises(ParameterError, match=r"'wanda'.*flap"):
        sweep_recipes(["structured"], [0.2], ["wanda"], full=False)
    with pytest.raises(ParameterError, match=r"sparsity"):
        sweep_recipes(["unstructured"], [1.2], ["wanda"], full=False)
    with pytest.raises(ParameterError, match="sparsity 20 was asked for. It is a share"):
        sweep_recipes(["structured"], [0.2, 20], [], full=False)


def measured(name: str, perplexity: float, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "granularity": "unstructured",
        "recipe": {**recipe, "label": name},
        "perplexity": {"test": {"value": perplexity, "windows": 4, "tokens": 96}},
        "prunable_before": 100,
        "prunable_after": 100 * (1 - recipe["sparsity"]),
        "params_before": 200,
        "params_after": 200 - 100 * recipe["sparsity"],
        "compression": 1.0,
        "seconds": {"decide": 1.0, "prune": 2.0},
        "trials": 0,
        "facts": {},
    }


def test_one_table_shows_every_model_and_names_what_is_missing(project: Path) -> None:
    values = read_yaml(Path("profiles/tiny.yaml"))
    with Path("profiles/other.yaml").open("w") as file:
        YAML().dump(values, file)
    parts = sweep.prepare(["tiny", "other"], ["unstructured"], [0.2], ["wanda"], False)
    assert [part.folder for part in parts] == [Path("studies/tiny"), Path("studies/other")]
    assert parts[0].stages == ["method@dense", "method@wanda-20"]
    # The studies are those of `compare`: the same stages, nothing of a sweep's own.
    assert list(read_yaml(Path("studies/other/dvc.yaml"))["stages"]) == list(STAGES)
    for number, part in enumerate(parts):
        for name, perplexity in (("dense", 10.0), ("wanda-20", 12.0 + number)):
            file = part.folder / METHOD.of(name).metrics[0]
            if number == 0 or name == "dense":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(measured(name, perplexity, part.recipes[name])))
    shown = sweep.table(parts)
    assert [(row["model"], row["method"]) for row in shown.rows] == [
        *(("tiny", "dense"), ("tiny", "wanda-20"), ("other", "dense"))
    ]
    assert shown.rows[1]["ratio_to_dense"] == pytest.approx(1.2)
    assert "| tiny | wanda-20 | unstructured | 0.20 | 12.00 | 1.200 |" in shown.markdown
    assert "Not measured: `wanda-20` on other." in shown.markdown
