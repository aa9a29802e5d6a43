"""What the drawings share: a method has one colour in all of them, ratios their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ffprune.stages import figures
from ffprune.stages.exhibits.results import Measured, Result, Subject

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
ONE_BY_ONE = ("#0b6e99", "#d1603d", "#5b8c5a", "#7a5195", "#c9a227", "#8a8a8a", "#1d4e7a")


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


def named(m: Measured) -> str:
    """Label and sparsity."""
    return f"{m.label}, {m.sparsity:.0%}" if m.sparsity else m.label


def perplexity_label(subject: Subject) -> str:
    """Of an axis of :meth:`Subject.ratio`."""
    text = {"test": "the test text", "wikitext2": "WikiText2", "ptb": "PTB", "c4": "C4"}.get(subject.text or "")
    return f"perplexity / dense, {text}" if text else "perplexity / dense"


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """As :func:`ffprune.stages.figures.panels`, with the grid behind the bars."""
    figure, axes = figures.panels(rows, columns, width, height, **options)
    for ax in axes:
        ax.set_axisbelow(True)
    return figure, axes


def decades(ax: Axes, axis: str, values: Sequence[float]) -> bool:
    """Make an axis logarithmic where the largest value is more than ten times the smallest; whether it is."""
    if not values or max(values) <= 10 * min(values):
        return False
    ax.set(**{f"{axis}scale": "log"})
    plain_ticks(ax, axis)
    return True


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
