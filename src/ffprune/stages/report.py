"""report: the summary that git keeps, the result table, the figures, and a page with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffprune.core.units import Allocation
from ffprune.stages import artifacts, figures
from ffprune.stages.context import StageContext
from ffprune.stages.figures import charts
from ffprune.stages.figures.chart import Chart
from ffprune.stages.page import Content, render
from ffprune.stages.policies import read_policy
from ffprune.stages.record import (
    CURVES,
    DOWNLOADED,
    EVALUATED,
    EVALUATION,
    FIGURES,
    PAGE,
    POLICIES,
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
    "macs_per_token",
    "kv_cache_bytes_per_token",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "prefill_over_dense",
    "decode_over_dense",
    "seconds",
    "path",
)


def run(ctx: StageContext) -> None:
    """Summary, table, figures and page, as files and in MLflow."""
    summary = summarise(artifacts.read_json(ctx.path(EVALUATION)))
    shown = _charts(ctx, summary)
    # Besides the figures: the page and what MLflow keeps.
    with ctx.progress(len(shown) + 2, "report") as bar:
        page = _page(ctx, summary, shown)
        bar.update(made="page")
        with artifacts.atomic_dir(ctx.path(FIGURES)) as folder:
            for chart in shown:
                figure = figures.draw(chart)
                figure.savefig(folder / f"{chart.name}.png", dpi=ctx.params.report.dpi)
                ctx.log_figure(figure, f"{chart.name}.png")
                bar.update(made=chart.name)
            (folder / "results.md").write_text(markdown(summary) + "\n", encoding="utf-8")
        artifacts.write_text(ctx.path(PAGE), page)
        artifacts.write_json(ctx.path(SUMMARY), summary)
        artifacts.write_json(ctx.path(RESULTS), results(summary))
        _log(ctx, summary)
        bar.update(made="record")


def _page(ctx: StageContext, summary: dict[str, Any], shown: list[Chart]) -> str:
    record = ctx.path(EVALUATED)
    return render(
        Content(
            summary,
            {chart.name: chart for chart in shown},
            artifacts.read_json(ctx.path(DOWNLOADED)),
            # A stage that is called as a function leaves no record.
            artifacts.read_json(record) if record.is_file() else {},
            ctx.param_values,
        )
    )


def _log(ctx: StageContext, summary: dict[str, Any]) -> None:
    """The page, the summary's rows and every model's ratio to the dense one."""
    ctx.log_file(ctx.path(PAGE))
    ctx.log_table("summary.json", summary["rows"])
    for row in summary["rows"]:
        if row["perplexity"] is not None:
            name = f"{row['method']} {row['sparsity_target']:g}".replace("+", " and ")
            ctx.log_metrics({f"ratio/{name}": row["perplexity"] / row["dense_perplexity"]})


def summarise(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The summary that git keeps, of what the stage evaluate wrote.

    Every row has the same keys, ``zero_shot`` among them where nothing was asked: `dvc plots` draws no other rows.
    """
    dense = evaluation["dense"]
    rows: list[dict[str, Any]] = [{"dense_perplexity": dense["perplexity"], **row} for row in evaluation["rows"]]
    return {
        "protocol": evaluation["protocol"],
        "dense": {key: value for key, value in dense.items() if key != "method"},
        "rows": [{key: row[key] for key in ROW} | {"zero_shot": row.get("zero_shot", {})} for row in rows],
    }


def _charts(ctx: StageContext, summary: dict[str, Any]) -> list[Chart]:
    searched, searches = {}, {}
    for name, path in (("search", SEARCH_POLICY), ("transfer", TRANSFER_POLICY)):
        allocation, facts = read_policy(ctx.path(path))
        searched[f"sparsity {facts['sparsity_target']:g}"] = allocation
        searches[name] = facts
    every = {
        f"{cut['policy']} {cut['sparsity_target']:g}": Allocation.from_rows(cut["units"])
        for cut in artifacts.read_json(ctx.path(POLICIES))
    }
    trials = {"search": SEARCH_EPISODES, "transfer": TRANSFER_EPISODES}
    return [
        charts.policy(searched),
        charts.policy(every, "policies", "Retention per layer, every policy"),
        charts.episodes({name: artifacts.read_csv(ctx.path(path)) for name, path in trials.items()}),
        charts.front(searches),
        charts.sensitivity(artifacts.read_json(ctx.path(TRACES)), artifacts.read_json(ctx.path(CURVES))),
        charts.perplexity(summary["dense"], summary["rows"]),
        charts.costs(summary["dense"], summary["rows"]),
    ]


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
