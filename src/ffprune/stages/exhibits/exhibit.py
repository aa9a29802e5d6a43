"""A paper's table or figure made again from a study's results: Markdown, CSV rows and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffprune.core.tables import look_up
from ffprune.export.markdown import markdown_table
from ffprune.stages.exhibits.columns import TEXTS, Column, columns_of
from ffprune.stages.exhibits.drawings import DRAWINGS
from ffprune.stages.exhibits.page import Cell, Rendered, off_target, recoveries, windows_shown
from ffprune.stages.exhibits.papers import Entry, Exhibit
from ffprune.stages.exhibits.results import (
    TASKS,
    Measured,
    Result,
    Setting,
    Subject,
    layer_of,
    on_target,
    removed_prunable,
    removed_whole,
    role_of,
    text_of,
)

NOT_RUN = "not run yet"
NO_TRACES = "No Hessian traces yet: the stage sensitivity makes them."
_DITTO = "″"  # the same reason as in the cell to the left


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
    text = text_of(found, [text for name in exhibit.columns if name in TEXTS for text in TEXTS[name]])
    drawing = look_up(DRAWINGS, exhibit.drawing, f"{exhibit.name}: drawing")
    subject = Subject(f"{exhibit.heading}: {exhibit.title}\n{setting.model}", text, measured, traces)
    drawn = drawing.has(subject)
    columns = columns_of(exhibit, found)
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
        drawing.titled(subject) if drawn else None,
    )


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
            gone = f"{removed_prunable(result):.1%}" + ("" if on_target(result) else " †")
            cells += [gone, f"{removed_whole(result):.1%}", f"`{entry.name}`"]
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
    return " ".join([*lines, *off_target(found), *recoveries(found)])


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
