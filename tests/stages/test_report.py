"""The summary, whose rows `dvc plots` draws, and the numbers that `dvc metrics` compares."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ffprune.stages.record import SUMMARY
from ffprune.stages.report import ROW, results, summarise
from tests.toy import DVC, REPO, make_repo

SCORE = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "n": 16}


def evaluation() -> dict[str, Any]:
    """As the stage evaluate writes it: tasks of the dense model and of the last row, a perplexity not finite."""

    def row(path: str, perplexity: float | None, **facts: Any) -> dict[str, Any]:
        known = dict.fromkeys(set(ROW) - {"dense_perplexity"}, 1.0)
        return known | {"path": path, "perplexity": perplexity, "nll_stderr": 0.1, **facts}

    return {
        "protocol": {"text": "test.txt", "windows": 6},
        "dense": {"method": "dense", "path": "models/dense", "perplexity": 20.0, "zero_shot": {"piqa": SCORE}},
        "rows": [row("first", 30.0), row("broken", None), row("last", 25.0, zero_shot={"piqa": SCORE})],
    }


def test_rows_of_the_summary_have_equal_keys() -> None:
    rows = summarise(evaluation())["rows"]
    assert [set(row) for row in rows] == [{*ROW, "zero_shot"}] * 3
    assert [row["zero_shot"] for row in rows] == [{}, {}, {"piqa": SCORE}]
    assert {row["dense_perplexity"] for row in rows} == {20.0}


@pytest.mark.slow
def test_dvc_draws_the_perplexity_of_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]["report"]
    make_repo(tmp_path, monkeypatch, json.dumps({"stages": {"report": {"cmd": "true", "plots": report["plots"]}}}))
    Path(SUMMARY).parent.mkdir()
    Path(SUMMARY).write_text(json.dumps(summarise(evaluation())))
    shown = subprocess.run([*DVC, "plots", "show", SUMMARY], capture_output=True, text=True, check=True)
    assert "WARNING" not in shown.stdout + shown.stderr
    page = Path("dvc_plots/index.html").read_text()
    assert "vegaEmbed" in page
    assert all(f'"path": "{name}"' in page for name in ("first", "broken", "last"))


def test_results_are_numbers_by_sparsity_and_method() -> None:
    def row(perplexity: float | None, **facts: Any) -> dict[str, Any]:
        return {"perplexity": perplexity, "params": 9, "seconds": 1.0, **facts}

    summary = {
        "protocol": {},
        "dense": row(20.0, zero_shot={"piqa": SCORE}),
        "rows": [
            row(30.0, method="uniform", sparsity_target=0.2, zero_shot={}),
            row(None, method="uniform", sparsity_target=0.3),
            row(25.0, method="searched", sparsity_target=0.2, zero_shot={"piqa": SCORE}),
        ],
    }
    tasks = {"piqa.acc_norm": 0.25, "piqa.acc": 0.5}
    assert results(summary) == {
        "dense": {"perplexity": 20.0, "params": 9, **tasks},
        "0.2": {
            "uniform": {"perplexity": 30.0, "params": 9},
            "searched": {"perplexity": 25.0, "params": 9, **tasks},
        },
        "0.3": {"uniform": {"perplexity": None, "params": 9}},
    }
