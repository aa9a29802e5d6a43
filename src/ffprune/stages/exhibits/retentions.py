"""Policies: how much of every unit stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ffprune.stages.exhibits.marks import ONE_BY_ONE, color, named, panels
from ffprune.stages.exhibits.results import Measured, Subject

_KINDS = {"attention": "Attention", "ffn": "FFN", "weight": "Weight matrices"}
_Rows = Sequence[Mapping[str, Any]]


def policy(subject: Subject) -> Figure:
    """Retention of every unit, a panel a kind of unit, a line a policy."""
    shown = [m for m in subject.measured if m.result["policy"]]
    return _by_kind([(named(m), m.result["policy"]) for m in shown], lambda inside: _shades([shown[i] for i in inside]))


def policy_points(subject: Subject) -> list[dict[str, object]]:
    """Every unit of every policy."""
    return [
        {"label": m.label, "method": m.result["name"], "sparsity_target": m.sparsity}
        | {key: row[key] for key in ("unit", "kind", "layer", "granules", "kept", "retention")}
        for m in subject.measured
        for row in m.result["policy"]
    ]


def search_policies(subject: Subject) -> Figure:
    """Retention of every unit at a few trials of a search, later trials darker (SS Fig. 13)."""
    m = next(m for m in subject.measured if m.result["policies"])
    trials = sorted(_trials(m), key=lambda trial: trial[0])
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, len(trials)))
    return _by_kind([(f"trial {number:,}", rows) for number, rows in trials], lambda inside: shades)


def search_policy_points(subject: Subject) -> list[dict[str, object]]:
    """Every unit of the trials that were kept."""
    return [
        {"label": m.label, "method": m.result["name"], "trial": trial}
        | {key: row[key] for key in ("unit", "retention")}
        for m in subject.measured
        for trial, rows in _trials(m)
        for row in rows
    ]


def _trials(m: Measured) -> list[tuple[int, _Rows]]:
    """Number and rows of every trial whose policy was kept."""
    return [
        (int(trial), [{**unit, "retention": r} for unit, r in zip(m.result["policy"], retentions, strict=True)])
        for trial, retentions in m.result["policies"].items()
    ]


def _by_kind(policies: Sequence[tuple[str, _Rows]], shades: Callable[[list[int]], Iterable[Any]]) -> Figure:
    """Policies by their labels, a panel a kind of unit; ``shades`` colours those that a panel has, by their places."""
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for _, rows in policies for row in rows)]
    figure, axes = panels(len(kinds), 1, 9, 0.8 + 2.5 * len(kinds))
    for ax, kind in zip(axes, kinds, strict=True):
        inside = [i for i, (_, rows) in enumerate(policies) if any(row["kind"] == kind for row in rows)]
        for number, (i, shade) in enumerate(zip(inside, shades(inside), strict=True)):
            label, rows = policies[i]
            _retentions(ax, [row for row in rows if row["kind"] == kind], shade, label, (number, len(inside)))
        ax.set_title(_KINDS[kind], loc="left", fontsize=10)
        ax.set(ylabel="retention", ylim=(0, 1.05), xlabel="matrix" if kind == "weight" else "layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(x=0.02)
        # Above the axes: a policy may pass through every corner.
        ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)
    return figure


def _retentions(ax: Axes, rows: _Rows, shade: Any, label: str, turn: tuple[int, int]) -> None:
    """One policy of several (``turn``: its number, how many): bars by layer, a line over the weight matrices."""
    values = [row["retention"] for row in rows]
    if rows[0]["kind"] == "weight":
        ax.plot(range(len(rows)), values, "-o", color=shade, markersize=2.5, linewidth=0.8, label=label)
        return
    number, count = turn
    shift = (number - (count - 1) / 2) * 0.8 / count
    ax.bar([row["layer"] + shift for row in rows], values, 0.8 / count, color=shade, label=label)


def _shades(measured: Sequence[Measured]) -> list[str]:
    """The methods' colours, or one after the other where two methods share one."""
    shades = [color(m.result) for m in measured]
    return shades if len(set(shades)) == len(shades) else [ONE_BY_ONE[i % len(ONE_BY_ONE)] for i in range(len(shades))]
