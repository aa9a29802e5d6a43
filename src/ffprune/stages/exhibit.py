"""A paper's table or figure made again from a study's results: Markdown, CSV rows and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ffprune.core.tables import look_up
from ffprune.stages.drawings import DRAWINGS, Subject
from ffprune.stages.papers import Entry, Exhibit
from ffprune.stages.results import (
    TASKS,
    Measured,
    Result,
    Setting,
    accuracy,
    last_search,
    layer_of,
    ratio,
    removed_prunable,
    removed_whole,
    role_of,
    text_of,
    total_seconds,
)

NOT_RUN = "not run yet"
NO_TRACES = "No Hessian traces yet: the stage sensitivity makes them."
#: Column -> names of its text in a result, the best first: a study's own test text stands in for WikiText2.
TEXTS = {"wikitext2": ("wikitext2", "test"), "ptb": ("ptb",), "c4": ("c4",)}
_DITTO = "″"  # the same reason as in the cell to the left


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


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    header: str
    cell: Callable[[Result], Cell]


def render(
    exhibit: Exhibit,
    results: Mapping[str, Result],
    setting: Setting,
    full: bool,
    traces: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """The exhibit with what has been measured so far.

    Args:
        exhibit: what to show.
        results: method name -> content of metrics/methods/NAME.json; missing ones are shown as such.
        setting: what the results have in common.
        full: the full variant.
        traces: rows of data/sensitivity/traces.json, for an exhibit that shows them.
    """
    entries = exhibit.entries(full)
    measured = [Measured(e.label, e.sparsity, results[e.name]) for e in entries if e.name and e.name in results]
    found = [m.result for m in measured]
    text = _first_text(exhibit, found)
    drawing = look_up(DRAWINGS, exhibit.drawing, f"{exhibit.name}: drawing")
    subject = Subject(f"{exhibit.heading}: {exhibit.title}\n{setting.model}", text, measured, traces)
    drawn = drawing.has(subject)
    columns = _columns(exhibit, found)
    if exhibit.traces:
        ours = [_trace_table(traces) if traces else NO_TRACES]
    else:
        ours = [_table(entries, results, columns), _protocol(exhibit, found, setting)]
    parts = [
        f"# {exhibit.heading}: {exhibit.title}",
        f"{exhibit.paper}. {'Full' if full else 'Short'} variant.",
        f"## Measured: {setting.model}",
        *ours,
        *([f"![{exhibit.heading}]({exhibit.name}.png)"] if drawn else []),
        *(["\n".join(f"- {note}" for note in exhibit.notes)] if exhibit.notes else []),
        *_printed(exhibit),
        *_models(exhibit),
    ]
    points = drawing.points(subject) if drawn else []
    head: dict[str, object] = {"exhibit": exhibit.name, "model": setting.model}
    return Rendered(
        "\n\n".join(parts) + "\n",
        [head | row for row in points or _cells(entries, results, columns)],
        drawing.draw(subject) if drawn else None,
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{share:.1%}"


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


# --- columns ---------------------------------------------------------------------------------------------


def _perplexity(title: str, texts: Sequence[str], found: Sequence[Result]) -> Column:
    text = text_of(found, texts)

    def cell(result: Result) -> Cell:
        if text is None or text not in result["perplexity"]:
            return Cell(f"no {title} text")
        return perplexity_shown(result, text)

    return Column(f"test text (for {title})" if text == "test" else title, cell)


def _accuracy(task: str) -> Column:
    def cell(result: Result) -> Cell:
        share = accuracy(result, task)
        return Cell("not asked") if share is None else Cell(f"{100 * share:.2f}", share)

    return Column(TASKS.get(task, task), cell)


def _average(tasks: Sequence[str]) -> Column:
    def cell(result: Result) -> Cell:
        shares = [share for task in tasks if (share := accuracy(result, task)) is not None]
        if not shares:
            return Cell("not asked")
        mean = sum(shares) / len(shares)
        return Cell(f"{100 * mean:.2f} (of {len(shares)})", mean)

    return Column("Average", cell)


def _seconds(result: Result) -> Cell:
    return _number(total_seconds(result), ",.0f")


def _search_seconds(result: Result) -> Cell:
    return _number(result["seconds"]["decide"], ",.0f")


def _episodes(result: Result) -> Cell:
    trials = last_search(result)
    return _number(len(trials), ",d") if trials else Cell("no search")


def _episode_seconds(result: Result) -> Cell:
    return _number(result["seconds"]["decide"] / result["trials"], ".2f") if result["trials"] else Cell("no search")


def _compression(result: Result) -> Cell:
    value = float(result["compression"])
    return Cell(f"{value:.1f}x", value)


def _speed(kind: str) -> Callable[[Result], Cell]:
    def cell(result: Result) -> Cell:
        speed = result["speed"]
        if not speed:
            return Cell("not measured")
        seconds, over_dense = 1000 / speed[f"{kind}_tokens_per_s"], float(speed[f"{kind}_over_dense"])
        return Cell(f"{seconds:,.2f} ({over_dense:.2f}x)", seconds, over_dense)

    return cell


def _number(value: float, style: str) -> Cell:
    return Cell(format(value, style), float(value))


COLUMNS: dict[str, Column] = {
    "search_seconds": Column("Search (s)", _search_seconds),
    "total_seconds": Column("Search and prune (s)", _seconds),
    "episodes": Column("Episodes", _episodes),
    "episode_seconds": Column("Episode time (s)", _episode_seconds),
    "compression": Column("Ratio", _compression),
    "prefill_seconds": Column("Prefill (s per 1,000 tokens, speed-up)", _speed("prefill")),
    "decode_seconds": Column("Decode (s per 1,000 tokens, speed-up)", _speed("decode")),
    **{task: _accuracy(task) for task in TASKS},
}


def _columns(exhibit: Exhibit, found: Sequence[Result]) -> dict[str, Column]:
    """The exhibit's columns; tasks that the study asked besides stand before the average, which counts them."""
    asked = [name for name in exhibit.columns if name in TASKS]
    others = sorted({task for result in found for task in result["zero_shot"]} - set(asked)) if asked else []
    columns: dict[str, Column] = {}
    for name in exhibit.columns:
        if name in TEXTS:
            title = "WikiText2" if name == "wikitext2" else name.upper()
            columns[name] = _perplexity(title, TEXTS[name], found)
        elif name == "average":
            columns |= {task: _accuracy(task) for task in others}
            columns[name] = _average([*asked, *others])
        else:
            columns[name] = look_up(COLUMNS, name, f"{exhibit.name}: column")
    return columns


def _first_text(exhibit: Exhibit, found: Sequence[Result]) -> str | None:
    return text_of(found, [text for name in exhibit.columns if name in TEXTS for text in TEXTS[name]])


# --- parts of the page -----------------------------------------------------------------------------------


def _table(entries: Sequence[Entry], results: Mapping[str, Result], columns: Mapping[str, Column]) -> str:
    header = [
        "Sparsity",
        "Method",
        *(c.header for c in columns.values()),
        "Removed, prunable",
        "Removed, model",
        "Run as",
    ]
    rows = []
    for entry in entries:
        result = results.get(entry.name) if entry.name else None
        if result is None:
            cells = [entry.reason or NOT_RUN, *[_DITTO] * (len(columns) + 1), f"`{entry.name}`" if entry.name else ""]
        else:
            cells = [column.cell(result).shown for column in columns.values()]
            cells += [percent(removed_prunable(result)), percent(removed_whole(result)), f"`{entry.name}`"]
        rows.append([f"{entry.sparsity:.0%}", entry.label, *cells])
    return markdown_table(header, rows)


def _cells(
    entries: Sequence[Entry], results: Mapping[str, Result], columns: Mapping[str, Column]
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for entry in entries:
        result = results.get(entry.name) if entry.name else None
        for name, column in columns.items():
            cell = column.cell(result) if result else Cell(entry.reason or NOT_RUN)
            rows.append(
                {
                    "sparsity_target": entry.sparsity,
                    "label": entry.label,
                    "method": entry.name,
                    "column": name,
                    "value": cell.value,
                    "ratio_to_dense": cell.ratio,
                    "reason": cell.shown if cell.value is None else None,
                    "removed_prunable": removed_prunable(result) if result else None,
                    "params_before": result["params_before"] if result else None,
                    "params_after": result["params_after"] if result else None,
                }
            )
    return rows


def _protocol(exhibit: Exhibit, found: Sequence[Result], setting: Setting) -> str:
    texts = dict.fromkeys(text_of(found, TEXTS[name]) for name in exhibit.columns if name in TEXTS)
    lines = [windows_shown(found, text, setting) for text in texts if text is not None]
    items = {task: row.get("n") for result in found for task, row in result["zero_shot"].items()}
    if items:
        counts = ", ".join(f"{TASKS.get(task, task)} {n}" for task, n in items.items() if n is not None)
        lines.append(
            f"Accuracy in percent, normalised by length where the task has that{counts and f'; items: {counts}'}."
        )
    lines.append(f"Computed in {setting.dtype}, seed {setting.seed}.")
    return " ".join([*lines, *recoveries(found)])


def _trace_table(traces: Sequence[Mapping[str, Any]]) -> str:
    roles = dict.fromkeys(role_of(row["matrix"]) for row in traces)
    rows = []
    for layer in sorted({layer_of(row["matrix"]) for row in traces}):
        inside = {
            role_of(row["matrix"]): float(row["sensitivity"]) for row in traces if layer_of(row["matrix"]) == layer
        }
        rows.append([str(layer), f"{sum(inside.values()):.3g}", *(f"{inside[role]:.3g}" for role in roles)])
    return markdown_table(["Layer", "All matrices", *roles], rows)


def _printed(exhibit: Exhibit) -> list[str]:
    if exhibit.printed is None:
        return ["## Printed in the paper", "A figure: its text prints no numbers."]
    table = markdown_table(exhibit.printed.columns, exhibit.printed.rows)
    note = [exhibit.printed.note] if exhibit.printed.note else []
    return ["## Printed in the paper, for its models", table, *note]


def _models(exhibit: Exhibit) -> list[str]:
    if not exhibit.models:
        return []
    rows = [[label, model.here] for label, model in exhibit.models.items()]
    return ["## The paper's models", markdown_table(["Model", "Here"], rows)]
