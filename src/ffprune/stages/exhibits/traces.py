"""Hessian traces by layer and by weight matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ffprune.stages.exhibits.marks import ONE_BY_ONE, panels
from ffprune.stages.exhibits.results import Subject, layer_of, role_of


def layer_traces(subject: Subject) -> Figure:
    """Sensitivity of every layer with the standard error over probes (MS Fig. 1)."""
    figure, (ax,) = panels(1, 1, 9, 4)
    layers = sorted({layer_of(row["matrix"]) for row in subject.traces})
    inside = [[row for row in subject.traces if layer_of(row["matrix"]) == layer] for layer in layers]
    sums = [sum(row["sensitivity"] for row in rows) for rows in inside]
    ax.errorbar(
        layers,
        sums,
        [sum((row["trace_stderr"] / row["weights"]) ** 2 for row in rows) ** 0.5 for rows in inside],
        fmt="-o",
        color=ONE_BY_ONE[0],
        ecolor="#999999",
        markersize=5,
    )
    _trace_axis(ax, sums)
    ax.set_ylabel("sum of average traces")
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
            color=ONE_BY_ONE[number % len(ONE_BY_ONE)],
            markersize=4,
            linewidth=0.8,
            label=role,
        )
    _trace_axis(ax, [row["sensitivity"] for row in subject.traces])
    ax.set_ylabel("average trace")
    figure.legend(loc="outside lower center", ncols=len(roles), frameon=False)
    return figure


def _trace_axis(ax: Axes, values: Sequence[float]) -> None:
    # Traces span decades, and noise makes the smallest ones negative.
    linear = max(float(np.median(np.abs(values))), 1e-12)
    ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(linear)))
    ax.axhline(0, color="#333333", linewidth=0.6)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def trace_points(subject: Subject) -> list[dict[str, object]]:
    """The traces themselves."""
    return [dict(row) for row in subject.traces]
