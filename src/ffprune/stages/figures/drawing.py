"""Charts as pictures, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffprune.core.units import Allocation
from ffprune.stages.figures import charts
from ffprune.stages.figures.chart import Chart, Panel, Series

_STYLES = {"line": "-", "line and points": "-o", "steps": "-", "points": "o", "crosses": "x"}


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with its axes, row by row; the options go to :meth:`Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, list(grid.flat)


def matrix_policy(allocation: Allocation) -> Figure:
    """Retention of every weight matrix: a column a layer, a row a role."""
    roles = list(dict.fromkeys(unit.name.rpartition(".")[2] for unit in allocation.units))
    layers = 1 + max(unit.layer for unit in allocation.units)
    grid = np.full((len(roles), layers), np.nan)
    for unit, share in zip(allocation.units, allocation.retention, strict=True):
        grid[roles.index(unit.name.rpartition(".")[2]), unit.layer] = share
    figure, (ax,) = panels(1, 1, 9, 3.2)
    ax.grid(visible=False)
    image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    ax.set(yticks=range(len(roles)), yticklabels=roles, xlabel="layer")
    figure.colorbar(image, ax=ax, label="retention")
    return figure


def policy(policies: Mapping[str, Allocation]) -> Figure:
    """Retention per layer, attention above FFN, a colour a policy."""
    return draw(charts.policy(policies))


def sensitivity(traces: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Hessian traces with standard errors, per layer and matrix, and what cutting a third of a unit costs."""
    return draw(charts.sensitivity(traces, curves))


def draw(chart: Chart) -> Figure:
    """A chart as a picture: one legend for all panels where they agree."""
    rows = -(-len(chart.panels) // chart.columns)
    width = 4.8 * chart.columns if chart.columns > 1 else 7 if rows == 1 else 9
    figure, axes = panels(rows, chart.columns, width, 4.6 if rows == 1 else 2.8 * rows)
    for ax, panel in zip(axes, chart.panels, strict=True):
        _panel(ax, panel)
        if not chart.common_legend and len(panel.series) > 1:
            ax.legend(frameon=False, fontsize=8, ncols=4 if len(panel.series) > 4 else 1)
    names = [series.name for series in chart.panels[0].series]
    if chart.common_legend and len(names) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        loc: Literal["outside upper right", "outside upper center"]
        loc = "outside upper right" if len(names) < 4 else "outside upper center"
        figure.legend(handles, labels, loc=loc, ncols=min(len(names), 3), frameon=False)
    return figure


def _panel(ax: Axes, panel: Panel) -> None:
    bars = [series for series in panel.series if series.kind == "bars"]
    for series in panel.series:
        if series.kind == "bars":
            width = 0.8 / len(bars)
            shift = (bars.index(series) - (len(bars) - 1) / 2) * width
            ax.bar(
                np.array(series.x) + shift,
                series.y,
                width,
                yerr=series.error,
                color=series.color,
                ecolor="#555555",
                label=series.name,
            )
        else:
            _points(ax, series)
    if panel.level is not None:
        ax.axhline(panel.level, color="#333333", linewidth=0.8, linestyle=":")
    if panel.y_scale == "symlog":
        ax.set_yscale("symlog", linthresh=panel.linear_within)
    else:
        ax.set_yscale(panel.y_scale)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.y_range is not None:
        ax.set_ylim(panel.y_range)


def _points(ax: Axes, series: Series) -> None:
    x, y = np.array(series.x), np.array(series.y)
    style = _STYLES[series.kind].replace("-", "--") if series.dashed else _STYLES[series.kind]
    options: dict[str, Any] = {"color": series.color, "label": series.name, "markersize": 4}
    if series.kind == "steps":
        options["drawstyle"] = "steps-mid"
    if series.faint:
        options["alpha"] = 0.45
    if series.error is None:
        ax.plot(x, y, style, **options)
    elif series.kind == "points":
        ax.errorbar(x, y, series.error, fmt="o", linewidth=0.8, **options)
    else:
        error = np.array(series.error)
        ax.plot(x, y, style, **options)
        ax.fill_between(x, y - error, y + error, color=series.color, alpha=0.15, linewidth=0)
