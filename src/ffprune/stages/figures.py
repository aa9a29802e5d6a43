"""The figures: policies, search curves, sensitivities, perplexity against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffprune.core.units import Allocation, Kind

_KINDS: tuple[tuple[Kind, str], ...] = (("attention", "Attention (key/value groups)"), ("ffn", "FFN (channels)"))
_COLORS = ("#0b6e99", "#d1603d", "#5b8c5a", "#7a5195", "#8a8a8a", "#c9a227")
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


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
    figure, axes = panels(2, 1, 9, 5.2)
    width = 0.8 / len(policies)
    for ax, (kind, title) in zip(axes, _KINDS, strict=True):
        for number, (name, allocation) in enumerate(policies.items()):
            chosen = [i for i, unit in enumerate(allocation.units) if unit.kind == kind]
            layers = np.array([allocation.units[i].layer for i in chosen])
            shift = (number - (len(policies) - 1) / 2) * width
            ax.bar(layers + shift, [allocation.retention[i] for i in chosen], width, label=name, color=_COLORS[number])
        ax.set(title=title, ylabel="retention", ylim=(0, 1.05))
    axes[-1].set_xlabel("layer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(policies))
    return figure


def episodes(searches: Mapping[str, Sequence[Mapping[str, str]]]) -> Figure:
    """Reward and perplexity of every trial, one column a search; a line joins the means of the updates."""
    figure, axes = panels(2, len(searches), 4.8 * len(searches), 5.6)
    for column, (name, rows) in enumerate(searches.items()):
        finite = [row for row in rows if row["perplexity"] != ""]
        for row_number, key in enumerate(("reward", "perplexity")):
            ax = axes[row_number * len(searches) + column]
            x = np.array([int(row["episode"]) for row in finite])
            y = np.array([float(row[key]) for row in finite])
            ax.plot(x, y, ".", color=_COLORS[0], alpha=0.45, label="trial")
            groups = np.array([float(row["dense_perplexity"]) for row in finite])
            starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(finite) else np.array([], int)
            parts = np.split(np.arange(len(finite)), starts[1:])
            ax.plot(
                [x[p].mean() for p in parts if len(p)],
                [y[p].mean() for p in parts if len(p)],
                "-o",
                color=_COLORS[1],
                markersize=4,
                label="mean of an update",
            )
            ax.set(title=f"{name}: {key}", xlabel="episode", ylabel=key)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def sensitivity(traces: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Hessian traces with standard errors, per layer and matrix, and what cutting a third of a unit costs."""
    figure, axes = panels(3, 1, 9, 9)
    layers = sorted({_layer(row["matrix"]) for row in traces})
    total = {layer: [r for r in traces if _layer(r["matrix"]) == layer] for layer in layers}
    axes[0].bar(
        layers,
        [sum(r["trace"] for r in total[layer]) for layer in layers],
        yerr=[sum(r["trace_stderr"] ** 2 for r in total[layer]) ** 0.5 for layer in layers],
        color=_COLORS[0],
        ecolor="#555555",
    )
    axes[0].set(title="Hessian trace per layer (standard error over probes)", ylabel="trace")
    axes[0].set_yscale("symlog", linthresh=10)
    roles = [role for role in _ROLES if any(row["matrix"].endswith(f".{role}") for row in traces)]
    for number, role in enumerate(roles):
        rows = [row for row in traces if row["matrix"].endswith(f".{role}")]
        axes[1].errorbar(
            [_layer(row["matrix"]) + (number - len(roles) / 2) * 0.09 for row in rows],
            [row["sensitivity"] for row in rows],
            [row["trace_stderr"] / row["weights"] for row in rows],
            fmt="o",
            markersize=3.5,
            linewidth=0.8,
            label=role,
        )
    axes[1].set_yscale("symlog", linthresh=1e-5)
    axes[1].set(title="Average Hessian trace per weight matrix (MS Eq. 6)", ylabel="trace / weights")
    axes[1].legend(ncols=len(roles), frameon=False, fontsize=8)
    for number, (kind, title) in enumerate(_KINDS):
        rows = [row for row in curves if row["unit"].endswith(f".{kind}")]
        losses = [row["loss"][int(np.ceil(0.7 * (len(row["loss"]) - 1)) - (kind == "attention"))] for row in rows]
        axes[2].plot(
            [int(row["unit"].split(".")[1]) for row in rows],
            losses,
            "-o",
            color=_COLORS[number],
            label=title,
            markersize=4,
        )
    axes[2].set_yscale("log")
    axes[2].set(
        title="Predicted loss of cutting a third of one unit alone, repaired", xlabel="layer", ylabel="nats per token"
    )
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def perplexity(dense: float, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity against sparsity, a line a method."""
    figure, axes = panels(1, 1, 7, 4.6)
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [(row["sparsity"], row["perplexity"]) for row in rows if row["method"] == method]
        points = [(0.0, dense), *((s, p) for s, p in points if p is not None)]
        axes[0].plot(
            *zip(*points, strict=True),
            "-o" if "+" in method else "--o",
            color=_COLORS[number % len(_COLORS)],
            label=method,
        )
    axes[0].axhline(dense, color="#333333", linewidth=0.8, linestyle=":")
    axes[0].set(
        title="Perplexity on the test text", xlabel="sparsity (removed / prunable weights)", ylabel="perplexity"
    )
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure


def front(searches: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss against sparsity: what a search's model says all over its range, and the candidates really compared."""
    figure, (ax,) = panels(1, 1, 7, 4.6)
    for color, (name, facts) in zip(_COLORS, searches.items(), strict=False):
        x, y, spread = (
            np.array([row[key] for row in facts["front"]]) for key in ("sparsity", "predicted_loss", "predicted_stderr")
        )
        if len(x):
            ax.plot(x, y, "-o", color=color, markersize=3, label=f"after {name}: predicted, best policy")
            ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.15, linewidth=0)
        points = [(row["sparsity"], row["loss"]) for row in facts["candidates"] if row["loss"] is not None]
        ax.plot(*zip(*points, strict=True), "x", color=color, label=f"{name}: candidates, measured")
    ax.set(
        title="The loss of every sparsity that one search serves",
        xlabel="sparsity (removed / prunable weights)",
        ylabel="loss above the dense model (nats per token)",
    )
    ax.legend(frameon=False, fontsize=8)
    return figure


def _layer(matrix: str) -> int:
    return int(matrix.split(".")[1])
