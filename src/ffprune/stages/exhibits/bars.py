"""Bars: perplexities, accuracies, speeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffprune.stages.exhibits.marks import color, decades, family, named, opacity, panels, perplexity_label, plain_ticks
from ffprune.stages.exhibits.results import TASKS, Result, Subject, accuracy


def ratio_bars(ax: Axes, labels: Sequence[str], results: Sequence[Result], ratios: Sequence[float | None]) -> None:
    """Horizontal bars that start at the dense model, the first on top; a ratio that is not finite says so."""
    finite = [value for value in ratios if value is not None]
    logarithmic = decades(ax, "x", finite)
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
    axes[-1].set_xlabel(perplexity_label(subject))
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
    figure.legend(loc="outside lower center", ncols=min(len(asked), 6), frameon=False)
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
    axes[0].set_yticks(range(len(timed)), [named(m) for m in timed])
    axes[0].set_ylim(len(timed) - 0.4, -0.6)
    return figure
