"""The result tables: metrics/summary.json, also as Markdown for Prefect's page, and methods on all their models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffprune.export.markdown import markdown_table
from ffprune.stages.artifacts import read_json
from ffprune.stages.exhibits.results import model_of, results_of
from ffprune.stages.exhibits.rows import HEADS, NOTE, cells, rows_of
from ffprune.stages.params import load_params
from ffprune.stages.record import PIPELINE_MODEL, SUMMARY
from ffprune.stages.sections import Params

_COLUMNS = (
    "method",
    "sparsity target",
    "sparsity",
    "perplexity",
    "ratio to dense",
    "parameters",
    "MB",
    "prefill / dense",
    "decode / dense",
)


def columns(summary: dict[str, Any]) -> tuple[str, ...]:
    """Names of the columns; a budget other than parameters adds what was removed of it, which targets are shares of."""
    budget = _budget(summary)
    return _COLUMNS if budget is None else (*_COLUMNS[:2], f"{budget} removed", *_COLUMNS[2:])


def result_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The dense model first, then every row of the summary."""
    dense, budget = summary["dense"], _budget(summary)
    rows = [{"method": "dense", "dense_perplexity": dense["perplexity"], **dense}, *summary["rows"]]
    return [_cells(row, budget) for row in rows]


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The model of lowest perplexity at every target, in their order; a target with none finite has none."""
    best: dict[tuple[str, float], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["budget"], row["sparsity_target"])
        if row["perplexity"] is not None and (key not in best or row["perplexity"] < best[key]["perplexity"]):
            best[key] = row
    return list(best.values())


def markdown(summary: dict[str, Any]) -> str:
    """The table in Markdown."""
    return markdown_table(columns(summary), result_rows(summary))


def grid_rows(params: Params) -> list[dict[str, object]]:
    """What was measured of the section ``methods``, model by model, in the order of the section ``models``."""
    results = results_of(Path(), params.methods).values()
    by_model = {name: [r for r in results if model_of(r) == name] for name in (PIPELINE_MODEL, *params.models)}
    return [row for name, own in by_model.items() for row in rows_of(own, name, tuple(params.study.texts))]


def print_table(as_json: bool) -> None:
    """Print the pipeline's table, and the grid where methods were measured.

    Raises:
        MissingInput: nothing was measured.
    """
    methods = grid_rows(load_params())
    # A study has methods alone.
    summary = None if methods and not Path(SUMMARY).is_file() else read_json(Path(SUMMARY))
    if as_json:
        print(json.dumps({"pipeline": summary, "methods": methods}, indent=2))
        return
    if summary:
        _print(SUMMARY, columns(summary), result_rows(summary))
    if methods:
        _print("Methods of params.yaml", HEADS, [cells(row) for row in methods], NOTE)


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=note)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    # Not a terminal: no reason to squeeze the table into 80 columns.
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def _budget(summary: dict[str, Any]) -> str | None:
    """What targets are shares of, where that is not parameters."""
    return next((row["budget"] for row in summary["rows"] if row.get("budget", "parameters") != "parameters"), None)


def _cells(row: dict[str, Any], budget: str | None) -> list[str]:
    removed = [] if budget is None else [number(row.get("removed", {}).get(budget), ".4f")]
    return [
        str(row["method"]),
        number(row.get("sparsity_target"), ".2f"),
        *removed,
        number(row.get("sparsity"), ".4f"),
        number(row["perplexity"], ".3f"),
        number(_ratio(row), ".3f"),
        number(row["params"], ",d"),
        number(row["bytes"] / 1e6, ",.1f"),
        # Ratios of the same rounds: tokens per second taken in different minutes do not compare.
        number(row.get("prefill_over_dense"), ".2f"),
        number(row.get("decode_over_dense"), ".2f"),
    ]


def _ratio(row: dict[str, Any]) -> float | None:
    """Perplexity over the dense model's; None when the pruned model's is not finite."""
    return None if row["perplexity"] is None else row["perplexity"] / row["dense_perplexity"]


def number(value: float | None, style: str) -> str:
    """A cell; empty where there is nothing to tell."""
    return "" if value is None else format(value, style)
