from __future__ import annotations

from pathlib import Path

import pytest

from ffprune.stages.artifacts import write_json
from ffprune.stages.table import markdown, print_table


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
    print_table()
    assert "searched+ridge" in capsys.readouterr().out
