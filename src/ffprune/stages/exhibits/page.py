"""What the pages share: a table, a cell with a perplexity, the sentences under a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ffprune.stages.exhibits.results import Result, Setting, on_target, ratio


@dataclass(frozen=True)
class Rendered:
    """A table or figure.

    Attributes:
        markdown: the page.
        rows: for a CSV file; all have the same keys.
        figure: None when there is nothing to draw yet.
    """

    markdown: str
    rows: list[dict[str, object]]
    figure: Figure | None


@dataclass(frozen=True)
class Cell:
    """What a column shows of a result: a number, or the reason why there is none."""

    shown: str
    value: float | None = None
    ratio: float | None = None


def perplexity_shown(result: Result, text: str) -> Cell:
    """Perplexity and its ratio to the dense model's."""
    value, over_dense = result["perplexity"][text]["value"], ratio(result, text)
    if value is None:
        return Cell("not finite")
    return Cell(f"{value:,.2f}" if over_dense is None else f"{value:,.2f} ({over_dense:.3f})", value, over_dense)


def windows_shown(results: Sequence[Result], text: str, setting: Setting) -> str:
    """Windows and tokens behind every perplexity on a text."""
    name = f"the study's test text ({setting.text})" if text == "test" else text
    rows = (result["perplexity"][text] for result in results if text in result["perplexity"])
    counts = dict.fromkeys(f"{row['windows']:,} windows, {row['tokens']:,} tokens" for row in rows)
    return f"Perplexity of {name}: {' or '.join(counts)}; in brackets the ratio to the dense model's."


def recoveries(results: Sequence[Result]) -> list[str]:
    """A sentence for every result with matrices whose Gram needed more damping than asked."""
    counts = {r["name"]: r["facts"].get("damped") or len(r["facts"].get("raised_damping", ())) for r in results}
    return [f"`{name}`: damping raised for {count} matrices." for name, count in counts.items() if count]


def off_target(results: Sequence[Result]) -> list[str]:
    """What † stands for, where a result needs it."""
    if all(on_target(result) for result in results):
        return []
    capped = any(r["recipe"]["allocator"] == "sparsitysolver" and not on_target(r) for r in results)
    why = " (SS Alg. 1 limits what units keep and never fills up: an untrained agent removes more)" if capped else ""
    return [f"†: removed another share of the prunable weights than asked, so not at equal parameters{why}."]
