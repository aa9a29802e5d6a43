"""Points and lines: perplexity against cost, compression, sparsity and calibration text; the trials of a search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ffprune.stages.exhibits.marks import ONE_BY_ONE, color, decades, panels, perplexity_label
from ffprune.stages.exhibits.results import Measured, Result, Subject, last_search, removed_prunable, total_seconds

_MARKERS = "os^Dvp<>*"


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
        decades(ax, axis, values)
    ax.set(xlabel=name, ylabel=perplexity_label(subject))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


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
    decades(ax, "y", [1.0, max(value for points in lines.values() for _, value, _ in points)])
    ax.axhline(1, color="#333333", linewidth=0.8, linestyle=":", label="Dense")
    ax.set(xlabel="removed / prunable weights, as achieved (%)", ylabel=perplexity_label(subject))
    ax.legend(frameon=False)
    return figure


def samples(subject: Subject) -> Figure:
    """Perplexity over the dense model's against calibration windows."""
    figure, (ax,) = panels(1, 1, 6.5, 4.2)
    found = [(m.result["recipe"]["calibration_windows"], subject.ratio(m.result)) for m in subject.measured]
    points = sorted((windows, value) for windows, value in found if value is not None)
    ax.plot([p[0] for p in points], [p[1] for p in points], "-o", color=ONE_BY_ONE[1])
    for windows, value in points:
        ax.annotate(f"{value:.3f}", (windows, value), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    ax.set_xticks([p[0] for p in points])
    ax.margins(0.1, 0.18)
    ax.set(xlabel="calibration windows", ylabel=perplexity_label(subject))
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
    decades(axes[1], "y", seen)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def search_points(subject: Subject) -> list[dict[str, object]]:
    """Every trial."""
    return [
        {"label": m.label, "method": m.result["name"], "trial": number}
        | {key: row[key] for key in ("reward", "perplexity")}
        for m in subject.measured
        for number, row in enumerate(last_search(m.result))
    ]
