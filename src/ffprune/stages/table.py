"""The result table: metrics/summary.json for the terminal and, as Markdown, for Prefect's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffprune.export.markdown import markdown_table
from ffprune.stages.artifacts import read_json
from ffprune.stages.record import SUMMARY

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


def print_table() -> None:
    """Print the table to the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{SUMMARY}")
    summary = read_json(Path(SUMMARY))
    for number, column in enumerate(columns(summary)):
        table.add_column(column, justify="right" if number else "left")
    for cells in result_rows(summary):
        table.add_row(*cells)
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
