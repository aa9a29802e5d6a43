"""A chart says the same whoever draws it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ffprune.core.units import Allocation, Unit
from ffprune.stages.figures import charts, drawing, interactive
from ffprune.stages.figures.chart import Chart, Panel, Series

UNITS = tuple(
    Unit(f"layers.{layer}.{kind}", kind, layer, granules, 10)
    for layer in range(3)
    for kind, granules in (("attention", 2), ("ffn", 8))
)
SEARCHED = Allocation(UNITS, (2, 8, 1, 5, 2, 4))
DENSE = {"perplexity": 20.0, "bytes": 4e6, "decode_over_dense": 1.0}
ROWS: list[dict[str, Any]] = [
    {"method": method, "sparsity": sparsity, "perplexity": value, "bytes": 3e6, "decode_over_dense": 1.1}
    for method, sparsity, value in (("broken", 0.2, None), ("uniform", 0.2, 50.0), ("uniform", 0.3, 90.0))
]


def panel(*values: float, error: tuple[float, ...] | None = None, **options: Any) -> Panel:
    places = tuple(float(place) for place in range(len(values)))
    return Panel("title", "x", "y", (Series("one", places, values, "#0b6e99", error=error),), **options)


def test_bars_of_both_are_the_retentions() -> None:
    chart = charts.policy({"sparsity 0.2": SEARCHED, "dense": Allocation.dense(UNITS)})
    drawn = drawing.draw(chart)
    for number, retentions in enumerate(([1, 0.5, 1], [1, 0.625, 0.5])):
        assert [bar.get_height() for bar in drawn.axes[number].patches] == [*retentions, 1, 1, 1]
        ours, dense = interactive.figure(chart.panels[number]).data
        assert (list(ours.y), list(dense.y), list(ours.x)) == (retentions, [1, 1, 1], [0, 1, 2])


def test_attention_that_lost_query_heads_alone_is_called_so() -> None:
    by_query = tuple(replace(unit, fixed=5) if unit.kind == "attention" else unit for unit in UNITS)
    titles = [charts.policy({"one": Allocation.dense(units)}).panels[0].title for units in (UNITS, by_query)]
    assert titles == ["Attention (key/value groups)", "Attention (query heads)"]


def test_many_policies_are_lines() -> None:
    chart = charts.policy({str(number): SEARCHED for number in range(4)})
    assert {series.kind for part in chart.panels for series in part.series} == {"steps"}
    (line, *_) = drawing.draw(chart).axes[1].lines
    assert list(line.get_ydata()) == list(interactive.figure(chart.panels[1]).data[0].y) == [1, 0.625, 0.5]


def test_a_model_without_a_finite_perplexity_has_no_point_and_the_others_keep_their_colour() -> None:
    (part,) = charts.perplexity(DENSE, ROWS).panels
    broken, uniform = part.series
    assert (broken.x, broken.y) == ((0,), (20,))
    assert (uniform.x, uniform.y) == ((0, 0.2, 0.3), (20, 50, 90))
    (whole,) = charts.perplexity(DENSE, [{**row, "perplexity": 30.0} for row in ROWS]).panels
    assert [series.color for series in whole.series] == [series.color for series in part.series]
    assert [series.y for series in charts.costs(DENSE, ROWS).panels[0].series] == [(20,), (), (50, 90)]


def test_trials_of_an_update_are_those_with_the_same_text() -> None:
    rewards = ("1", "2", "5", "7", "9")
    rows = [
        {"episode": str(number), "reward": reward, "perplexity": "8.0", "dense_perplexity": text}
        for number, (reward, text) in enumerate(zip(rewards, ("4.0", "4.0", "6.0", "6.0", "6.0"), strict=True))
    ]
    rows[3]["perplexity"] = ""  # not finite: no trial to show
    trials, means = charts.episodes({"search": rows}).panels[0].series
    assert (trials.x, trials.y) == ((0, 1, 2, 4), (1, 2, 5, 9))
    assert (means.x, means.y) == ((0.5, 3), (1.5, 7))


def test_a_search_of_which_no_trial_was_finite_and_a_front_of_nothing_are_drawn() -> None:
    empty = charts.episodes({"search": []})
    nothing = charts.front({"search": {"front": [], "candidates": []}})
    for chart in (empty, nothing):
        assert all(len(series.x) == 0 for part in chart.panels for series in part.series)
        drawing.draw(chart).savefig("/dev/null", format="png")
        assert "Plotly" in interactive.element(chart.panels[0], "a")


def test_the_front_is_a_line_with_its_error_and_what_was_measured() -> None:
    facts = {
        "front": [
            {"sparsity": 0.1, "predicted_loss": 0.2, "predicted_stderr": 0.05},
            {"sparsity": 0.2, "predicted_loss": 0.5, "predicted_stderr": 0.1},
        ],
        "candidates": [
            {"sparsity": 0.2, "loss": 0.4, "tokens": 8},
            {"sparsity": 0.2, "loss": None, "tokens": 8},
            {"sparsity": 0.2, "loss": 0.3, "tokens": 2},  # left behind
        ],
    }
    band, line, crosses = interactive.figure(charts.front({"search": facts}).panels[0]).data
    assert list(band.y) == pytest.approx([0.25, 0.6, 0.4, 0.15])
    assert (list(line.y), list(crosses.y)) == ([0.2, 0.5], [0.4])


def test_a_scale_around_zero_keeps_order_and_its_ticks_their_places() -> None:
    values = (-5000.0, -10.0, -1.0, 0.0, 3.0, 10.0, 100.0, 1e5)
    made = interactive.figure(panel(*values, error=(1.0,) * len(values), y_scale="symlog", linear_within=10))
    # Linear up to 10, then a unit a decade.
    assert list(made.data[-1].y) == pytest.approx([-1 - math.log10(500), -1, -0.1, 0, 0.3, 1, 2, 5])
    ticks = dict(zip(made.layout.yaxis.ticktext, made.layout.yaxis.tickvals, strict=True))
    assert ticks == {"-1000": -3, "-100": -2, "-10": -1, "0": 0, "10": 1, "100": 2, "1000": 3, "10000": 4, "100000": 5}
    # What is hovered over is told as it is.
    assert list(made.data[-1].customdata) == list(values)


@pytest.mark.parametrize("values", [(20.0, 90.0), (19.5, 23.0), (0.001, 0.1), (1.0, 1e6)])
def test_a_logarithmic_axis_has_numbers_inside_its_range(values: tuple[float, float]) -> None:
    axis = interactive.figure(panel(*values, y_scale="log")).layout.yaxis
    assert axis.type == "log"
    inside = [tick for tick in axis.tickvals if values[0] / 1.1 <= tick <= values[1] * 1.1]
    assert list(axis.tickvals) == inside
    assert len(inside) >= 2
    assert [float(text) for text in axis.ticktext] == pytest.approx(inside)


def test_errors_of_both_are_the_same() -> None:
    part = panel(1.0, 4.0, error=(0.5, 1.0))
    bars = Panel("t", "x", "y", (Series("one", (0.0, 1.0), (1.0, 4.0), "#0b6e99", kind="bars", error=(0.5, 1.0)),))
    (trace,) = interactive.figure(bars).data
    assert (list(trace.error_y.array), list(trace.error_y.arrayminus)) == ([0.5, 1], [0.5, 1])
    band = interactive.figure(part).data[0]
    (drawn,) = drawing.draw(Chart("a", "a", "a", (part,))).axes[0].collections
    corners = {tuple(corner) for corner in np.round(drawn.get_paths()[0].vertices, 6)}
    assert set(zip(band.x, band.y, strict=True)) <= corners
