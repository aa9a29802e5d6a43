"""report: the summary that git keeps, the result table and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.policies import read_policy
from ffprune.stages.record import (
    CURVES,
    EVALUATION,
    FIGURES,
    RESULTS,
    SEARCH_EPISODES,
    SEARCH_POLICY,
    SUMMARY,
    TRACES,
    TRANSFER_EPISODES,
    TRANSFER_POLICY,
)
from ffprune.stages.table import markdown

ROW = (
    "method",
    "granularity",
    "budget",
    "sparsity_target",
    "sparsity",
    "removed",
    "perplexity",
    "dense_perplexity",
    "params",
    "prunable_params",
    "bytes",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "prefill_over_dense",
    "decode_over_dense",
    "seconds",
    "path",
)


def run(ctx: StageContext) -> None:
    """Summary, table and figures, as files and in MLflow."""
    evaluation = artifacts.read_json(ctx.path(EVALUATION))
    dense = evaluation["dense"]
    rows: list[dict[str, Any]] = [{"dense_perplexity": dense["perplexity"], **row} for row in evaluation["rows"]]
    summary = {
        "protocol": evaluation["protocol"],
        "dense": {key: value for key, value in dense.items() if key != "method"},
        "rows": [
            {key: row[key] for key in ROW} | ({"zero_shot": row["zero_shot"]} if "zero_shot" in row else {})
            for row in rows
        ],
    }
    policies, searches = {}, {}
    for name, path in (("search", SEARCH_POLICY), ("transfer", TRANSFER_POLICY)):
        allocation, facts = read_policy(ctx.path(path))
        policies[f"sparsity {facts['sparsity_target']:g}"] = allocation
        searches[name] = facts
    drawn = {
        "policy": figures.policy(policies),
        "episodes": figures.episodes(
            {
                "search": artifacts.read_csv(ctx.path(SEARCH_EPISODES)),
                "transfer": artifacts.read_csv(ctx.path(TRANSFER_EPISODES)),
            }
        ),
        "front": figures.front(searches),
        "sensitivity": figures.sensitivity(
            artifacts.read_json(ctx.path(TRACES)), artifacts.read_json(ctx.path(CURVES))
        ),
        "perplexity": figures.perplexity(dense["perplexity"], rows),
    }
    with artifacts.atomic_dir(ctx.path(FIGURES)) as folder:
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=ctx.params.report.dpi)
            ctx.log_figure(figure, f"{name}.png")
        (folder / "results.md").write_text(markdown(summary) + "\n", encoding="utf-8")
    artifacts.write_json(ctx.path(SUMMARY), summary)
    artifacts.write_json(ctx.path(RESULTS), results(summary))
    ctx.log_table("summary.json", summary["rows"])
    for row in summary["rows"]:
        if row["perplexity"] is not None:
            name = f"{row['method']} {row['sparsity_target']:g}".replace("+", " and ")
            ctx.log_metrics({f"ratio/{name}": row["perplexity"] / row["dense_perplexity"]})


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `dvc metrics` compares: a few numbers by sparsity and method. It shows no lists; speeds would be noise."""

    def scores(row: Mapping[str, Any]) -> dict[str, Any]:
        tasks = {
            f"{task}.{name}": score[name]
            for task, score in row.get("zero_shot", {}).items()
            for name in ("acc_norm", "acc")
            if name in score
        }
        return {"perplexity": row["perplexity"], "params": row["params"], **tasks}

    found: dict[str, Any] = {"dense": scores(summary["dense"])}
    for row in summary["rows"]:
        found.setdefault(f"{row['sparsity_target']:g}", {})[row["method"]] = scores(row)
    return found
