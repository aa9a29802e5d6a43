"""The numbers that `dvc metrics` compares."""

from __future__ import annotations

from typing import Any

from ffprune.stages.report import results


def test_results_are_numbers_by_sparsity_and_method() -> None:
    score = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "n": 16}

    def row(perplexity: float | None, **facts: Any) -> dict[str, Any]:
        return {"perplexity": perplexity, "params": 9, "seconds": 1.0, **facts}

    summary = {
        "protocol": {},
        "dense": row(20.0, zero_shot={"piqa": score}),
        "rows": [
            row(30.0, method="uniform", sparsity_target=0.2),
            row(None, method="uniform", sparsity_target=0.3),
            row(25.0, method="searched", sparsity_target=0.2, zero_shot={"piqa": score}),
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
