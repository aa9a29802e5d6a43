"""The page's tables: numbers of metrics/summary.json and of the run that measured them, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffprune.stages.table import best_rows, columns, number, result_rows

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: what the rows are.
        header: names of the columns; the first names the rows.
        rows: as many cells each.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def results(summary: _Row) -> Table:
    """As ``ffprune table`` prints it."""
    return Table("Every model that was measured", columns(dict(summary)), result_rows(dict(summary)))


def sizes(summary: _Row) -> Table:
    """What the models take and how fast they are."""
    header = (
        "method",
        "sparsity target",
        "prunable weights left",
        "multiply-adds a token",
        "KV cache, bytes a token",
        "prefill, tokens/s",
        "decode, tokens/s",
    )
    keys = ("prunable_params", "macs_per_token", "kv_cache_bytes_per_token")
    cells = [
        [
            *_named(row),
            *(f"{row[key]:,}" for key in keys),
            *(f"{row[key]:,.1f}" for key in ("prefill_tokens_per_s", "decode_tokens_per_s")),
        ]
        for row in _models(summary)
    ]
    return Table("Sizes and speeds", header, cells)


def zero_shot(summary: _Row) -> Table | None:
    """Every metric of every task with its standard error; None where no task was asked."""
    asked = [row for row in _models(summary) if row.get("zero_shot")]
    found = [
        [
            *_named(row),
            task,
            metric,
            *(number(score, ".3f") for score in (value, scores.get(f"{metric}_stderr"))),
            str(scores.get("n", "")),
        ]
        for row in asked
        for task, scores in row["zero_shot"].items()
        for metric, value in scores.items()
        if metric != "n" and not metric.endswith("_stderr")
    ]
    header = ("method", "sparsity target", "task", "metric", "value", "standard error", "items")
    return Table("Zero-shot tasks (lm-evaluation-harness)", header, found) if found else None


def facts(caption: str, values: _Row) -> Table:
    """One fact a row; what is not known has none."""
    shown = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in values.items()]
    return Table(caption, ("fact", "value"), [row for row in shown if row[1] != "None"])


def splits(text: Mapping[str, Mapping[str, Any]]) -> Table:
    """The parts of the text."""
    counts = list(dict.fromkeys(key for part in text.values() for key in part))
    rows = [[name, *(f"{part[key]:,}" for key in counts)] for name, part in text.items()]
    return Table("The text, split by article", ("split", *counts), rows)


def headlines(summary: _Row) -> list[dict[str, str]]:
    """Of every sparsity: the best model that was measured, what is gone, and what that cost."""
    dense = summary["dense"]
    return [
        {
            "target": f"{best['sparsity_target']:.0%}",
            "budget": "prunable weights" if best["budget"] == "parameters" else str(best["budget"]),
            "method": str(best["method"]),
            "path": str(best["path"]),
            "perplexity": f"{best['perplexity']:.2f}",
            "ratio": f"{best['perplexity'] / best['dense_perplexity']:.3f}",
            "parameters": _change(best, dense, "params", ",d"),
            "size": _change(best, dense, "bytes", ",.1f", 1e6),
            "cache": _change(best, dense, "kv_cache_bytes_per_token", ",d"),
            "prefill": f"{best['prefill_over_dense']:.2f}",
            "decode": f"{best['decode_over_dense']:.2f}",
        }
        for best in best_rows(summary["rows"])
    ]


def _change(row: _Row, dense: _Row, key: str, style: str, unit: float | None = None) -> str:
    before, after = (values[key] if unit is None else values[key] / unit for values in (dense, row))
    if before == after:
        return f"{before:{style}} (as before)"
    return f"{before:{style}} → {after:{style}} ({after / before - 1:+.1%})"


def _models(summary: _Row) -> list[_Row]:
    return [{"method": "dense", **summary["dense"]}, *summary["rows"]]


def _named(row: _Row) -> list[str]:
    return [str(row["method"]), number(row.get("sparsity_target"), ".2f")]
