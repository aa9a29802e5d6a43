"""Charts for a page, by plotly: every panel a figure of its own, so that a narrow page sets them below each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go
import plotly.offline

from ffprune.stages.figures.chart import Panel, Series

_MODES = {"line": "lines", "line and points": "lines+markers", "steps": "lines", "points": "markers"}
_MODES["crosses"] = "markers"
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
_INK, _GRID = "#1a1a1a", "#dddddd"


def library() -> str:
    """The JavaScript that draws the figures, to be written into the page: it then needs no network."""
    return str(plotly.offline.get_plotlyjs())


def element(panel: Panel, identifier: str) -> str:
    """The panel as an HTML element; the same panel gives the same text."""
    return str(
        figure(panel).to_html(
            config=_CONFIG, include_plotlyjs=False, full_html=False, div_id=identifier, default_height="100%"
        )
    )


def figure(panel: Panel) -> go.Figure:
    """The panel as a figure that fits itself to the width of the page."""
    made = go.Figure()
    shared = len(panel.series) > 1
    for series in panel.series:
        if series.error is not None and series.kind != "bars" and series.kind != "points":
            made.add_trace(_band(series, panel))
        made.add_trace(_trace(series, panel))
    made.update_layout(
        template="none",
        autosize=True,
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        barmode="group",
        bargap=0.2,
        showlegend=shared,
        # Below the axes: above them are the buttons.
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "font": {"size": 12}},
        hovermode="closest",
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    made.update_xaxes(title=panel.x_label, gridcolor=_GRID, zeroline=False, automargin=True)
    made.update_yaxes(title=panel.y_label, gridcolor=_GRID, zeroline=False, automargin=True)
    if panel.y_scale == "log":
        made.update_yaxes(type="log", **_log_ticks(panel))
    elif panel.y_scale == "symlog":
        made.update_yaxes(**_symlog_ticks(panel))
    if panel.y_range is not None:
        made.update_yaxes(range=list(panel.y_range))
    if panel.level is not None:
        made.add_hline(panel.level, line={"color": "#333333", "width": 1, "dash": "dot"})
    return made


def _trace(series: Series, panel: Panel) -> Any:
    y = _placed(series.y, panel)
    common: dict[str, Any] = {"name": series.name, "x": series.x, "y": y, "customdata": series.y}
    common["hovertemplate"] = f"{panel.x_label}: %{{x:.4~g}}<br>{panel.y_label}: %{{customdata:.4~g}}"
    if series.error is not None and series.kind in ("bars", "points"):
        above = _placed([v + e for v, e in zip(series.y, series.error, strict=True)], panel)
        below = _placed([v - e for v, e in zip(series.y, series.error, strict=True)], panel)
        common["error_y"] = {
            "array": [top - at for top, at in zip(above, y, strict=True)],
            "arrayminus": [at - low for low, at in zip(below, y, strict=True)],
            "thickness": 1,
            "width": 2,
            "color": "#555555" if series.kind == "bars" else series.color,
        }
    if series.kind == "bars":
        return go.Bar(marker={"color": series.color}, **common)
    return go.Scatter(
        mode=_MODES[series.kind],
        marker={"color": series.color, "symbol": "x-thin" if series.kind == "crosses" else "circle", "size": 6}
        | ({"line": {"color": series.color, "width": 2}, "size": 8} if series.kind == "crosses" else {}),
        line={
            "color": series.color,
            "width": 2,
            "dash": "dash" if series.dashed else "solid",
            "shape": "hvh" if series.kind == "steps" else "linear",
        },
        opacity=0.5 if series.faint else 1,
        **common,
    )


def _band(series: Series, panel: Panel) -> Any:
    assert series.error is not None
    above = [value + error for value, error in zip(series.y, series.error, strict=True)]
    below = [value - error for value, error in zip(series.y, series.error, strict=True)]
    red, green, blue = (int(series.color[at : at + 2], 16) for at in (1, 3, 5))
    return go.Scatter(
        x=[*series.x, *reversed(series.x)],
        y=_placed([*above, *reversed(below)], panel),
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def _placed(values: Iterable[float], panel: Panel) -> list[float]:
    """Where values stand on the axis: plotly has no scale that is linear around zero and logarithmic outside."""
    return [_symlog(value, panel.linear_within) if panel.y_scale == "symlog" else value for value in values]


def _symlog(value: float, linear: float) -> float:
    size = abs(value) / linear
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def _log_ticks(panel: Panel) -> dict[str, Any]:
    """Plain numbers, at least four where possible: many of these axes span less than a decade."""
    values = [v for series in panel.series for v in series.y if v > 0] + ([panel.level] if panel.level else [])
    if not values:
        return {}
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks: list[float] = []
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)):
        every = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in every if min(values) / 1.1 <= tick <= max(values) * 1.1]
        if len(ticks) >= 4:
            break
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _symlog_ticks(panel: Panel) -> dict[str, Any]:
    """A tick a decade, on both sides of zero as far as there are points."""
    values = [v for series in panel.series for v in series.y] or [0.0]
    decades = math.ceil(math.log10(max(max(map(abs, values)) / panel.linear_within, 1)))
    sizes = [panel.linear_within * 10**decade for decade in range(decades + 1)]
    ticks = [-size for size in sizes if -size >= min(values)] + [0.0] + sizes
    return {
        "tickvals": [_symlog(tick, panel.linear_within) for tick in ticks],
        "ticktext": [f"{tick:g}" for tick in ticks],
    }
