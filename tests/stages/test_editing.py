"""Parameters changed by name."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.editing import parse_changes, set_parameters
from ffprune.stages.params import load_params
from tests.toy import REPO


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(REPO / "params.yaml", tmp_path))


def test_only_the_lines_that_change_change(file: Path) -> None:
    before = file.read_text()
    told = set_parameters({"search.sparsity": 0.25, "compute.device_map": "auto", "seed": 0}, file)
    assert told == ["search.sparsity: 0.2 -> 0.25", "compute.device_map: None -> auto"]
    changed = difflib.unified_diff(before.splitlines(), file.read_text().splitlines(), lineterm="", n=0)
    added = [line for line in changed if line.startswith("+ ")]
    assert [line.split("#")[0].split() for line in added] == [["+", "device_map:", "auto"], ["+", "sparsity:", "0.25"]]
    assert all("#" in line for line in added)  # the comments stay
    assert load_params(file).search.sparsity == 0.25


def test_nothing_new_writes_nothing(file: Path) -> None:
    before = file.stat().st_mtime_ns
    assert set_parameters({"seed": 0}, file) == []
    assert set_parameters({}, file) == []
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search.sparsitty": 0.3}, "did you mean 'sparsity'"),
        ({"search.sparsity": 3}, r"search\.sparsity.*given: 3"),
        ({"serch.sparsity": 0.3}, "has no 'serch' with entries"),
        ({"seed.more": 1}, "has no 'seed' with entries"),
        ({"seed": 1, "search.sparsity": "much"}, r"search\.sparsity"),
    ],
)
def test_what_is_wrong_is_not_written(file: Path, changes: dict[str, object], said: str) -> None:
    before = file.read_text()
    with pytest.raises(ParameterError, match=said):
        set_parameters(changes, file)
    assert file.read_text() == before


def test_words_of_a_command_line() -> None:
    assert parse_changes(["a.b=0.3", "c=null", "d=[x, y]", "e=1e-3", "f=x=y"]) == {
        "a.b": 0.3,
        "c": None,
        "d": ["x", "y"],
        "e": 0.001,
        "f": "x=y",
    }
    for word in ("seed", "seed=[1"):
        with pytest.raises(ParameterError, match="NAME=VALUE"):
            parse_changes([word])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="does not exist"):
        set_parameters({"seed": 1}, tmp_path / "params.yaml")
