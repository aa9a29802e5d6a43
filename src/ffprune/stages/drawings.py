"""How the papers' tables and figures are drawn; a method has one colour in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ffprune.stages import figures
from ffprune.stages.results import (
    TASKS,
    Measured,
    Result,
    accuracy,
    last_search,
    layer_of,
    ratio,
    removed_prunable,
    role_of,
    total_seconds,
)

#: Colour of a method, by :func:`family`.
COLORS = {
    "dense": "#333333",
    "gptq": "#777777",
    "uniform": "#9a9a9a",
    "handmade": "#c9a227",
    "dynamic_programming": "#8c6d1f",
    "magnitude": "#b3a79b",
    "wanda": "#0b6e99",
    "owl": "#5b8c5a",
    "besa": "#7a5195",
    "sparsegpt": "#4fa3c7",
    "trace_rank": "#d1603d",
    "trace_rank_layer": "#e8a387",
    "flap": "#2a9d8f",
    "slicegpt": "#9c5fb0",
    "svd_llm": "#c98bb9",
    "eas": "#3f7d4e",
    "evopress": "#93bf85",
    "amc": "#1d4e7a",
    "fastforward": "#e07a2f",
    "sparsitysolver": "#b23a48",
    "warm": "#e9b44c",
    "guided": "#6b4226",
}
_ONE_BY_ONE = ("#0b6e99", "#d1603d", "#5b8c5a", "#7a5195", "#c9a227", "#8a8a8a", "#1d4e7a")
_MARKERS = "os^Dvp<>*"
_KINDS = {"attention": "Attention", "ffn": "FFN", "weight": "Weight matrices"}
_LOG_FROM = 10.0  # a logarithmic axis where the largest ratio is this many times the smallest


@dataclass(frozen=True)
class Subject:
    """What is drawn.

    Attributes:
        title: of the figure.
        text: of the perplexities; None when no result has one of those asked for.
        measured: the rows that have a result, in order of sparsity.
        traces: rows of data/sensitivity/traces.json.
    """

    title: str
    text: str | None
    measured: Sequence[Measured]
    traces: Sequence[Mapping[str, Any]]

    def ratio(self, result: Result) -> float | None:
        """Perplexity over the dense model's on the figure's text."""
        return None if self.text is None else ratio(result, self.text)


@dataclass(frozen=True)
class Drawing:
    """A kind of figure.

    Attributes:
        draw: makes it.
        has: whether there is something to draw.
        points: its numbers for a CSV file, where the table's cells are not its numbers.
    """

    draw: Callable[[Subject], Figure]
    has: Callable[[Subject], bool]
    points: Callable[[Subject], list[dict[str, object]]] = lambda subject: []


def family(recipe: Mapping[str, Any]) -> str:
    """What a method is known by: who decides, or else what it prunes with."""
    if recipe["compressor"] == "none":
        return "gptq" if recipe["quantize"] else "dense"
    if recipe["compressor"] in ("slicegpt", "svd_llm"):
        return str(recipe["compressor"])
    if recipe["allocator"] != "uniform" or recipe["compressor"] == "slice":
        return str(recipe["allocator"])
    return "sparsegpt" if recipe["compressor"] == "sparsegpt" else str(recipe["criterion"])


def color(result: Result) -> str:
    """The method's colour."""
    return COLORS[family(result["recipe"])]


def opacity(result: Result) -> float:
    """Paler for a structured cut that is left unrepaired."""
    recipe = result["recipe"]
    return 0.5 if recipe["compressor"] == "slice" and recipe["repair"] is None else 1.0


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """As :func:`ffprune.stages.figures.panels`, with the grid behind the bars."""
    figure, axes = figures.panels(rows, columns, width, height, **options)
    for ax in axes:
        ax.set_axisbelow(True)
    return figure, axes


def ratio_bars(ax: Axes, labels: Sequence[str], results: Sequence[Result], ratios: Sequence[float | None]) -> None:
    """Horizontal bars that start at the dense model, the first on top; a ratio that is not finite says so."""
    finite = [value for value in ratios if value is not None]
    logarithmic = bool(finite) and max(finite) > _LOG_FROM * min(finite)
    if logarithmic:
        ax.set_xscale("log")
    for place, (result, value) in enumerate(zip(results, ratios, strict=True)):
        if value is not None:
            ax.barh(place, value - 1, 0.7, left=1, color=color(result), alpha=opacity(result))
        shown = "not finite" if value is None else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
        ax.annotate(shown, (max(value or 1, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.axvline(1, color="#333333", linewidth=0.8)
    # Room on the right for the numbers.
    least, most = min([*finite, 1.0]), max([*finite, 1.05])
    ax.set_xlim(least, most * (most / least) ** 0.22 if logarithmic else most + 0.18 * (most - least))
    if logarithmic:
        plain_ticks(ax, "x")


def plain_ticks(ax: Axes, axis: str) -> None:
    """Numbers, not powers, on a logarithmic axis."""
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    chosen.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    low, high = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
    if low > 0 and high / low > 30:
        chosen.set_minor_formatter(FuncFormatter(lambda value, place: ""))
    else:
        chosen.set_minor_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
        chosen.set_tick_params(which="minor", labelsize=8)


# --- tables ----------------------------------------------------------------------------------------------


def perplexity(subject: Subject) -> Figure:
    """Perplexity over the dense model's, a bar a method, a panel a sparsity."""
    shown = [m for m in subject.measured if family(m.result["recipe"]) != "dense"] or list(subject.measured)
    groups = {s: [m for m in shown if m.sparsity == s] for s in dict.fromkeys(m.sparsity for m in shown)}
    sizes = [len(group) for group in groups.values()]
    figure, axes = panels(
        len(groups), 1, 7.5, 1.0 + 0.34 * sum(sizes) + 0.55 * len(groups), height_ratios=[s + 0.6 for s in sizes]
    )
    for ax, (sparsity, group) in zip(axes, groups.items(), strict=True):
        results = [m.result for m in group]
        ratio_bars(ax, [m.label for m in group], results, [subject.ratio(result) for result in results])
        ax.set_title(f"{sparsity:.0%} sparsity", fontsize=10)
    axes[-1].set_xlabel(_perplexity_label(subject))
    figure.suptitle(subject.title, fontsize=11)
    return figure


def zero_shot(subject: Subject) -> Figure:
    """Accuracy on every task, a bar a method."""
    tasks = list(dict.fromkeys(task for m in subject.measured for task in m.result["zero_shot"]))
    asked = [m for m in subject.measured if m.result["zero_shot"]]
    figure, (ax,) = panels(1, 1, max(6.5, 1.5 + 0.2 * len(tasks) * len(asked)), 4.2)
    width = 0.8 / len(asked)
    for number, m in enumerate(asked):
        places = np.arange(len(tasks)) + (number - (len(asked) - 1) / 2) * width
        shares = [100 * (accuracy(m.result, task) or 0.0) for task in tasks]
        ax.bar(places, shares, width * 0.92, color=color(m.result), alpha=opacity(m.result), label=m.label)
    ax.set_xticks(range(len(tasks)), [TASKS.get(task, task) for task in tasks])
    ax.grid(visible=False, axis="x")
    ax.set_ylabel("accuracy (%)")
    figure.suptitle(subject.title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(len(asked), 6), frameon=False)
    return figure


def cost(subject: Subject) -> Figure:
    """Perplexity over the dense model's against the time to search and prune."""
    return _scatter(subject, lambda m: total_seconds(m.result), "search and prune (s)")


def compression(subject: Subject) -> Figure:
    """Perplexity over the dense model's against the compression ratio."""
    return _scatter(subject, lambda m: float(m.result["compression"]), "compression ratio")


def _scatter(subject: Subject, place: Callable[[Measured], float], name: str) -> Figure:
    figure, (ax,) = panels(1, 1, 7, 4.4)
    points = [(m, place(m), value) for m in subject.measured if (value := subject.ratio(m.result)) is not None]
    labels = [m.label for m, _, _ in points]
    for number, (m, x, y) in enumerate(points):
        label = f"{m.label}, {m.sparsity:.0%}" if labels.count(m.label) > 1 else m.label
        # A legend: points of equal compression would write over each other.
        marker = _MARKERS[number % len(_MARKERS)]
        ax.plot(x, y, marker, color=color(m.result), markersize=9, label=label, markeredgecolor="white")
    ax.margins(0.08, 0.1)
    for axis, values in (("x", [x for _, x, _ in points]), ("y", [y for _, _, y in points])):
        if max(values) > _LOG_FROM * min(values):
            ax.set(**{f"{axis}scale": "log"})
            plain_ticks(ax, axis)
    ax.set(xlabel=name, ylabel=_perplexity_label(subject))
    figure.suptitle(subject.title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


# --- figures ---------------------------------------------------------------------------------------------


def sweep(subject: Subject) -> Figure:
    """Perplexity over the dense model's against what is really removed, a line a method."""
    figure, (ax,) = panels(1, 1, 7, 4.4)
    lines: dict[str, list[tuple[float, float, Result]]] = {}
    for m in subject.measured:
        value = subject.ratio(m.result)
        if value is not None:
            lines.setdefault(m.label, []).append((100 * removed_prunable(m.result), value, m.result))
    for label, points in lines.items():
        ax.plot([p[0] for p in points], [p[1] for p in points], "-o", color=color(points[0][2]), label=label)
    values = [value for points in lines.values() for _, value, _ in points]
    if values and max(values) > _LOG_FROM:
        ax.set_yscale("log")
        plain_ticks(ax, "y")
    ax.axhline(1, color="#333333", linewidth=0.8, linestyle=":", label="Dense")
    ax.set(xlabel="removed / prunable weights, as achieved (%)", ylabel=_perplexity_label(subject))
    ax.legend(frameon=False)
    figure.suptitle(subject.title, fontsize=11)
    return figure


def policy(subject: Subject) -> Figure:
    """Retention of every unit, a panel a kind of unit, a line a policy."""
    shown = [m for m in subject.measured if m.result["policy"]]
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for m in shown for row in m.result["policy"])]
    figure, axes = panels(len(kinds), 1, 9, 0.8 + 2.5 * len(kinds))
    for ax, kind in zip(axes, kinds, strict=True):
        inside = [m for m in shown if any(row["kind"] == kind for row in m.result["policy"])]
        for number, (m, shade) in enumerate(zip(inside, _shades(inside), strict=True)):
            rows = [row for row in m.result["policy"] if row["kind"] == kind]
            retentions = [row["retention"] for row in rows]
            _retentions(ax, kind, rows, retentions, shade, _named(m), (number, len(inside)))
        _retention_axis(ax, kind)
    figure.suptitle(subject.title, fontsize=11)
    return figure


def search_policies(subject: Subject) -> Figure:
    """Retention of every unit at a few trials of a search, later trials darker (SS Fig. 13)."""
    m = next(m for m in subject.measured if m.result["policies"])
    units = m.result["policy"]
    trials = sorted(m.result["policies"], key=int)
    kinds = [kind for kind in _KINDS if any(unit["kind"] == kind for unit in units)]
    figure, axes = panels(len(kinds), 1, 9, 0.8 + 2.5 * len(kinds))
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, len(trials)))
    for ax, kind in zip(axes, kinds, strict=True):
        chosen = [number for number, unit in enumerate(units) if unit["kind"] == kind]
        for number, (trial, shade) in enumerate(zip(trials, shades, strict=True)):
            retentions = [m.result["policies"][trial][i] for i in chosen]
            rows = [units[i] for i in chosen]
            _retentions(ax, kind, rows, retentions, shade, f"trial {int(trial):,}", (number, len(trials)))
        _retention_axis(ax, kind)
    figure.suptitle(subject.title, fontsize=11)
    return figure


def samples(subject: Subject) -> Figure:
    """Perplexity over the dense model's against calibration windows."""
    figure, (ax,) = panels(1, 1, 6.5, 4.2)
    found = [(m.result["recipe"]["calibration_windows"], subject.ratio(m.result)) for m in subject.measured]
    points = sorted((windows, value) for windows, value in found if value is not None)
    ax.plot([p[0] for p in points], [p[1] for p in points], "-o", color=_ONE_BY_ONE[1])
    for windows, value in points:
        ax.annotate(f"{value:.3f}", (windows, value), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    ax.set_xticks([p[0] for p in points])
    ax.margins(0.1, 0.18)
    ax.set(xlabel="calibration windows", ylabel=_perplexity_label(subject))
    figure.suptitle(subject.title, fontsize=11)
    return figure


def search(subject: Subject) -> Figure:
    """Reward and perplexity of every trial, and their running means (SS Fig. 6 and 7)."""
    figure, axes = panels(1, 2, 10, 4.2)
    for m in subject.measured:
        rows = last_search(m.result)
        for ax, key in zip(axes, ("reward", "perplexity"), strict=True):
            finite = [(number, row[key]) for number, row in enumerate(rows) if row[key] is not None]
            x, y = np.array([p[0] for p in finite]), np.array([p[1] for p in finite], float)
            ax.plot(x, y, ".", color=color(m.result), alpha=0.3, markersize=5 if len(x) < 200 else 2)
            span = max(5, len(x) // 20)
            if len(x) >= span:
                mean = np.convolve(y, np.ones(span) / span, "valid")
                ax.plot(x[span - 1 :], mean, color=color(m.result), linewidth=1.8, label=f"{m.label}, mean of {span}")
    for ax, key in zip(axes, ("reward", "perplexity"), strict=True):
        ax.set(title=key, xlabel="trial")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    seen = [row["perplexity"] for m in subject.measured for row in last_search(m.result) if row["perplexity"]]
    if max(seen, default=1) > _LOG_FROM * min(seen, default=1):
        axes[1].set_yscale("log")
        plain_ticks(axes[1], "y")
    figure.suptitle(subject.title, fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def speed(subject: Subject) -> Figure:
    """Seconds for 1,000 tokens, read at once and written one by one, and the speed-up (SS Fig. 14)."""
    timed = [m for m in subject.measured if m.result["speed"]]
    figure, axes = panels(1, 2, 9.5, 1.6 + 0.4 * len(timed), sharey=True)
    for ax, name in zip(axes, ("prefill", "decode"), strict=True):
        for place, m in enumerate(timed):
            seconds = 1000 / m.result["speed"][f"{name}_tokens_per_s"]
            shown = f"{seconds:,.2f} ({m.result['speed'][f'{name}_over_dense']:.2f}x)"
            ax.barh(place, seconds, 0.7, color=color(m.result))
            ax.annotate(shown, (seconds, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set(title=name, xlabel="seconds for 1,000 tokens (speed over the dense model's)")
        ax.margins(x=0.3)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(timed)), [_named(m) for m in timed])
    axes[0].set_ylim(len(timed) - 0.4, -0.6)
    figure.suptitle(subject.title, fontsize=11)
    return figure


def layer_traces(subject: Subject) -> Figure:
    """Sensitivity of every layer with the standard error over probes (MS Fig. 1)."""
    figure, (ax,) = panels(1, 1, 9, 4)
    layers = sorted({layer_of(row["matrix"]) for row in subject.traces})
    inside = [[row for row in subject.traces if layer_of(row["matrix"]) == layer] for layer in layers]
    ax.errorbar(
        layers,
        [sum(row["sensitivity"] for row in rows) for rows in inside],
        [sum((row["trace_stderr"] / row["weights"]) ** 2 for row in rows) ** 0.5 for rows in inside],
        fmt="-o",
        color=_ONE_BY_ONE[0],
        ecolor="#999999",
        markersize=5,
    )
    _trace_axis(ax, [sum(row["sensitivity"] for row in rows) for rows in inside])
    ax.set_ylabel("sum of average traces")
    figure.suptitle(subject.title, fontsize=11)
    return figure


def matrix_traces(subject: Subject) -> Figure:
    """Sensitivity of every weight matrix with the standard error over probes (MS Fig. 2)."""
    figure, (ax,) = panels(1, 1, 10, 4.8)
    roles = list(dict.fromkeys(role_of(row["matrix"]) for row in subject.traces))
    for number, role in enumerate(roles):
        rows = [row for row in subject.traces if role_of(row["matrix"]) == role]
        ax.errorbar(
            [layer_of(row["matrix"]) + (number - (len(roles) - 1) / 2) * 0.1 for row in rows],
            [row["sensitivity"] for row in rows],
            [row["trace_stderr"] / row["weights"] for row in rows],
            fmt="o",
            color=_ONE_BY_ONE[number % len(_ONE_BY_ONE)],
            markersize=4,
            linewidth=0.8,
            label=role,
        )
    _trace_axis(ax, [row["sensitivity"] for row in subject.traces])
    ax.set_ylabel("average trace")
    figure.suptitle(subject.title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(roles), frameon=False)
    return figure


# --- parts -----------------------------------------------------------------------------------------------


def _perplexity_label(subject: Subject) -> str:
    text = {"test": "the test text", "wikitext2": "WikiText2", "ptb": "PTB", "c4": "C4"}.get(subject.text or "")
    return f"perplexity / dense, {text}" if text else "perplexity / dense"


def _named(m: Measured) -> str:
    return f"{m.label}, {m.sparsity:.0%}" if m.sparsity else m.label


def _shades(measured: Sequence[Measured]) -> list[str]:
    """The methods' colours, or one after the other where two methods share one."""
    shades = [color(m.result) for m in measured]
    return (
        shades if len(set(shades)) == len(shades) else [_ONE_BY_ONE[i % len(_ONE_BY_ONE)] for i in range(len(shades))]
    )


def _retentions(
    ax: Axes,
    kind: str,
    units: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    shade: Any,
    label: str,
    turn: tuple[int, int],
) -> None:
    """One policy of several (``turn``: its number, how many): bars by layer, a line over the weight matrices."""
    if kind == "weight":
        ax.plot(range(len(units)), values, "-o", color=shade, markersize=2.5, linewidth=0.8, label=label)
        return
    number, count = turn
    shift = (number - (count - 1) / 2) * 0.8 / count
    ax.bar([unit["layer"] + shift for unit in units], values, 0.8 / count, color=shade, label=label)


def _retention_axis(ax: Axes, kind: str) -> None:
    ax.set_title(_KINDS[kind], loc="left", fontsize=10)
    ax.set(ylabel="retention", ylim=(0, 1.05), xlabel="matrix" if kind == "weight" else "layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.02)
    # Above the axes: a policy may pass through every corner.
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)


def _trace_axis(ax: Axes, values: Sequence[float]) -> None:
    # Traces span decades, and noise makes the smallest ones negative.
    linear = max(float(np.median(np.abs(values))), 1e-12)
    ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(linear)))
    ax.axhline(0, color="#333333", linewidth=0.6)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _policy_points(subject: Subject) -> list[dict[str, object]]:
    return [
        {"label": m.label, "method": m.result["name"], "sparsity_target": m.sparsity}
        | {key: row[key] for key in ("unit", "kind", "layer", "granules", "kept", "retention")}
        for m in subject.measured
        for row in m.result["policy"]
    ]


def _search_policy_points(subject: Subject) -> list[dict[str, object]]:
    return [
        {
            "label": m.label,
            "method": m.result["name"],
            "trial": int(trial),
            "unit": unit["unit"],
            "retention": retention,
        }
        for m in subject.measured
        for trial, retentions in m.result["policies"].items()
        for unit, retention in zip(m.result["policy"], retentions, strict=True)
    ]


def _search_points(subject: Subject) -> list[dict[str, object]]:
    return [
        {"label": m.label, "method": m.result["name"], "trial": number}
        | {key: row[key] for key in ("reward", "perplexity")}
        for m in subject.measured
        for number, row in enumerate(last_search(m.result))
    ]


def _trace_points(subject: Subject) -> list[dict[str, object]]:
    return [dict(row) for row in subject.traces]


def _finite(subject: Subject) -> bool:
    return any(subject.ratio(m.result) is not None for m in subject.measured)


def _filled(key: str) -> Callable[[Subject], bool]:
    return lambda subject: any(m.result[key] for m in subject.measured)


def _traced(subject: Subject) -> bool:
    return bool(subject.traces)


DRAWINGS: dict[str, Drawing] = {
    "perplexity": Drawing(perplexity, _finite),
    "zero_shot": Drawing(zero_shot, _filled("zero_shot")),
    "cost": Drawing(cost, _finite),
    "compression": Drawing(compression, _finite),
    "sweep": Drawing(sweep, _finite),
    "policy": Drawing(policy, _filled("policy"), _policy_points),
    "search_policies": Drawing(search_policies, _filled("policies"), _search_policy_points),
    "samples": Drawing(samples, _finite),
    "search": Drawing(search, _filled("episodes"), _search_points),
    "speed": Drawing(speed, _filled("speed")),
    "layer_traces": Drawing(layer_traces, _traced, _trace_points),
    "matrix_traces": Drawing(matrix_traces, _traced, _trace_points),
}
