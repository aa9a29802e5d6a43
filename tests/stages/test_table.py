from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffprune.core.errors import MissingInput
from ffprune.stages.artifacts import write_json
from ffprune.stages.record import METHOD, SUMMARY
from ffprune.stages.table import markdown, print_table
from tests.stages.made_up import result
from tests.stages.test_recipes import PLAIN
from tests.stages.tiny_project import params
from tests.toy import REPO


def test_the_table_starts_with_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    row = {
        "method": "searched+ridge",
        "sparsity_target": 0.2,
        "sparsity": 0.20001,
        "perplexity": 30.0,
        "dense_perplexity": 20.0,
        "params": 1_000_000,
        "bytes": 2_000_000,
        "prefill_over_dense": 1.234,
        "decode_over_dense": 1.1,
    }
    dense = {"perplexity": 20.0, "params": 1_200_000, "bytes": 2_400_000, "path": "models/dense"}
    summary = {"dense": dense, "rows": [row]}
    write_json(Path("metrics/summary.json"), summary)
    lines = markdown(summary).splitlines()
    assert lines[2] == "| dense |  |  | 20.000 | 1.000 | 1,200,000 | 2.4 |  |  |"
    assert lines[3] == "| searched+ridge | 0.20 | 0.2000 | 30.000 | 1.500 | 1,000,000 | 2.0 | 1.23 | 1.10 |"
    told = [{**row, "budget": "latency", "removed": {"parameters": 0.20001, "macs": 0.19, "latency": 0.2345}}]
    other = markdown({"dense": dense, "rows": told}).splitlines()
    assert other[0].startswith("| method | sparsity target | latency removed | sparsity | perplexity |")
    assert other[2].startswith("| dense |  |  |  | 20.000 |")
    assert other[3].startswith("| searched+ridge | 0.20 | 0.2345 | 0.2000 | 30.000 |")
    shutil.copy(REPO / "params.yaml", "params.yaml")
    print_table(as_json=False)
    shown = capsys.readouterr().out
    assert "searched+ridge" in shown
    assert "Methods of params.yaml" not in shown
    print_table(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"pipeline": summary, "methods": []}


def test_methods_stand_beside_their_own_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    itself = {"compressor": "none", "criterion": None, "sparsity": 0.0, "label": "Dense"}
    recipes = {
        "other-50": {**PLAIN, "model": "other", "label": "Wanda"},
        "alone-50": {**PLAIN, "model": "alone", "label": "Wanda"},
        "wanda-50": {**PLAIN, "label": "Wanda"},
        "other": {**PLAIN, **itself, "model": "other"},
        "dense": {**PLAIN, **itself},
        "not-yet": PLAIN,
    }
    values = {"other-50": 12.0, "alone-50": 40.0, "wanda-50": 30.0, "other": 10.0, "dense": 20.0}
    source = {"source": {"kind": "local", "path": "somewhere"}}
    given = params(models={"other": source, "alone": source}, methods=recipes)
    write_json(Path("params.yaml"), given.model_dump(mode="json"))
    with pytest.raises(MissingInput, match=SUMMARY):
        print_table(as_json=False)
    for name, value in values.items():
        told = {"test": {"value": value, "stderr": 0.1, "windows": 4, "tokens": 96}}
        write_json(Path(METHOD.of(name).metrics[0]), result(name, recipes[name], perplexity=told))
    print_table(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] is None
    assert [(row["model"], row["method"], row["ratio_to_dense"]) for row in found["methods"]] == [
        ("dense", "dense", 1.0),
        ("dense", "wanda-50", 1.5),
        ("other", "other", 1.0),
        ("other", "other-50", 1.2),
        ("alone", "alone-50", None),
    ]
    print_table(as_json=False)
    shown = capsys.readouterr().out
    assert "Methods of params.yaml" in shown
    assert SUMMARY not in shown
