"""The pipeline's figures as data: policies, search curves, sensitivities, perplexity against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffprune.core.units import Allocation, Kind
from ffprune.stages.figures.chart import Chart, Panel, Series

_KINDS: tuple[tuple[Kind, str], ...] = (("attention", "Attention (key/value groups)"), ("ffn", "FFN (channels)"))
_QUERY_HEADS = "Attention (query heads)"
_COLORS = ("#0b6e99", "#d1603d", "#5b8c5a", "#7a5195", "#8a8a8a", "#c9a227")
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_ROLE_COLORS = ("#0b6e99", "#d1603d", "#5b8c5a", "#b23a48", "#7a5195", "#8c6d1f", "#e377c2")
#: More policies than these as bars side by side cannot be told apart.
_MOST_BARS = 3
_SPARSITY = "sparsity (removed / prunable weights)"


def policy(
    policies: Mapping[str, Allocation], name: str = "policy", title: str = "Retention per layer, searched policies"
) -> Chart:
    """Retention per layer, attention above FFN, a colour a policy."""
    many = len(policies) > _MOST_BARS
    panels = []
    by_query = any(unit.kind == "attention" and unit.fixed for one in policies.values() for unit in one.units)
    for kind, part in _KINDS:
        # Keys and values stay whatever goes, where granules are query heads.
        part = _QUERY_HEADS if by_query and kind == "attention" else part
        series = []
        for number, (label, allocation) in enumerate(policies.items()):
            chosen = [
                (unit.layer, share)
                for unit, share in zip(allocation.units, allocation.retention, strict=True)
                if unit.kind == kind
            ]
            series.append(_series(label, chosen, number, kind="steps" if many else "bars"))
        panels.append(Panel(part, "layer", "retention", tuple(series), y_range=(0, 1.05)))
    return Chart(
        name,
        title,
        "The share of every layer's attention heads and FFN channels that each policy keeps.",
        tuple(panels),
    )


def episodes(searches: Mapping[str, Sequence[Mapping[str, str]]]) -> Chart:
    """Reward and perplexity of every trial, one column a search that had any; a line joins the means of the updates."""
    panels = []
    searches = {name: rows for name, rows in searches.items() if rows} or searches
    for key in ("reward", "perplexity"):
        for name, rows in searches.items():
            finite = [row for row in rows if row["perplexity"] != ""]
            points = [(float(row["episode"]), float(row[key])) for row in finite]
            # Trials of an update share their text, and so the dense model's perplexity.
            groups = np.array([float(row["dense_perplexity"]) for row in finite])
            starts = np.flatnonzero(groups[1:] != groups[:-1]) + 1
            parts = [part for part in np.split(np.array(points), starts) if len(part)]
            means = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]
            series = (
                _series("trial", points, 0, kind="points", faint=True),
                _series("mean of an update", means, 1),
            )
            panels.append(Panel(f"{name}: {key}", "episode", key, series))
    return Chart(
        "episodes",
        "Trials of the searches",
        "Reward and perplexity of every policy that was tried, on the validation text of its update. Updates differ in "
        "text, so only trials of one update compare.",
        tuple(panels),
        columns=len(searches),
    )


def sensitivity(traces: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]) -> Chart:
    """Hessian traces with standard errors, per layer and matrix, and what cutting a third of a unit costs."""
    layers = sorted({_layer(row["matrix"]) for row in traces})
    inside = [[row for row in traces if _layer(row["matrix"]) == layer] for layer in layers]
    sums = [(layer, sum(row["trace"] for row in rows)) for layer, rows in zip(layers, inside, strict=True)]
    errors = tuple(sum(row["trace_stderr"] ** 2 for row in rows) ** 0.5 for rows in inside)
    roles = [role for role in _ROLES if any(row["matrix"].endswith(f".{role}") for row in traces)]
    matrices = []
    for number, role in enumerate(roles):
        rows = [row for row in traces if row["matrix"].endswith(f".{role}")]
        # Beside each other: error bars over one another could not be read.
        points = [(_layer(row["matrix"]) + (number - len(roles) / 2) * 0.09, row["sensitivity"]) for row in rows]
        spread = tuple(row["trace_stderr"] / row["weights"] for row in rows)
        color = _ROLE_COLORS[number]
        matrices.append(Series(role, *_columns(points), color, kind="points", error=spread))
    losses = []
    for number, (kind, title) in enumerate(_KINDS):
        rows = [row for row in curves if row["unit"].endswith(f".{kind}")]
        points = [
            (_layer(row["unit"]), row["loss"][int(np.ceil(0.7 * (len(row["loss"]) - 1)) - (kind == "attention"))])
            for row in rows
        ]
        losses.append(_series(title, points, number))
    return Chart(
        "sensitivity",
        "Hessian traces and predicted losses",
        "How much the loss feels every layer, weight matrix and unit of the dense model. Bars are standard errors over "
        "probes; noise makes small traces negative.",
        (
            Panel(
                "Hessian trace per layer",
                "layer",
                "trace",
                (_series("trace", sums, 0, kind="bars", error=errors),),
                y_scale="symlog",
                linear_within=10,
            ),
            Panel(
                "Average Hessian trace per weight matrix (MS Eq. 6)",
                "layer",
                "trace / weights",
                tuple(matrices),
                y_scale="symlog",
                linear_within=1e-5,
            ),
            Panel(
                "Predicted loss of cutting a third of one unit alone, repaired",
                "layer",
                "nats per token",
                tuple(losses),
                y_scale="log",
            ),
        ),
    )


def perplexity(dense: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Perplexity against sparsity, a line a method, from the dense model on."""
    series = []
    for number, (method, mine) in enumerate(_by_method(rows).items()):
        points = [(0.0, dense["perplexity"]), *((row["sparsity"], row["perplexity"]) for row in mine)]
        series.append(_series(method, points, number, dashed="+" not in method))
    title, level = "Perplexity on the test text", dense["perplexity"]
    panel = Panel(title, _SPARSITY, "perplexity", tuple(series), y_scale="log", level=level)
    description = "Perplexity on the test text, which no other stage reads; the dotted line is the dense model."
    return Chart("perplexity", title, description, (panel,))


def costs(dense: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Perplexity against what the models take: bytes and time."""

    def panel(title: str, x_label: str, key: str, unit: float) -> Panel:
        # No lines: methods of one sparsity share their size, and speeds are not in order.
        series = [Series("dense", (dense[key] / unit,), (dense["perplexity"],), "#333333", kind="crosses")]
        for number, (method, mine) in enumerate(_by_method(rows).items()):
            points = [(row[key] / unit, row["perplexity"]) for row in mine]
            series.append(_series(method, points, number, kind="points"))
        return Panel(title, x_label, "perplexity", tuple(series), y_scale="log", level=dense["perplexity"])

    return Chart(
        "costs",
        "What the perplexity buys",
        "The same perplexities against the size of the weights on disk, and against the speed of decoding over the "
        "dense model's, measured in turns. A repair changes neither.",
        (panel("Size", "weights (MB)", "bytes", 1e6), panel("Decoding", "speed / dense", "decode_over_dense", 1)),
        columns=2,
    )


def front(searches: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Loss against sparsity: what a search's model says all over its range, and the candidates really measured.

    Those that a comparison left behind are not shown: they were measured on less text.
    """
    series = []
    for number, (name, facts) in enumerate(searches.items()):
        predicted = [(row["sparsity"], row["predicted_loss"]) for row in facts["front"]]
        spread = tuple(row["predicted_stderr"] for row in facts["front"])
        most = max((row["tokens"] for row in facts["candidates"]), default=0)
        finite = [row for row in facts["candidates"] if row["tokens"] == most and row["loss"] is not None]
        measured = [(row["sparsity"], row["loss"]) for row in finite]
        series += [
            _series(f"after {name}: predicted, best policy", predicted, number, error=spread),
            _series(f"{name}: candidates, measured", measured, number, kind="crosses"),
        ]
    panel = Panel(
        "The loss of every sparsity that one search serves",
        _SPARSITY,
        "loss above dense (nats per token)",
        tuple(one for one in series if one.x),
    )
    return Chart(
        "front",
        "The Pareto front of sparsity and loss",
        "The least loss that the search's model predicts at every sparsity of its range, with its standard error, and "
        "the best candidates, measured on held-out windows.",
        (panel,),
    )


def _by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows with a finite perplexity; a method keeps its colour when it has none."""
    return {
        method: [row for row in rows if row["method"] == method and row["perplexity"] is not None]
        for method in dict.fromkeys(row["method"] for row in rows)
    }


def _series(name: str, points: Sequence[tuple[float, float]], number: int, **options: Any) -> Series:
    return Series(name, *_columns(points), _COLORS[number % len(_COLORS)], **options)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(x) for x, _ in points), tuple(float(y) for _, y in points)


def _layer(name: str) -> int:
    return int(name.split(".")[1])
