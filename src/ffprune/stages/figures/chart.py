"""What a figure shows, apart from who draws it: the picture and the page's figure cannot come to differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Values = tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend.
        x, y: the points, one number each.
        color: as ``#rrggbb``.
        kind: how they are shown; ``steps`` holds every value over its unit of x.
        dashed: the line is.
        faint: points of which there are many.
        error: standard errors of ``y``, shown as bars (with a line: as a band); None: there are none.
    """

    name: str
    x: Values
    y: Values
    color: str
    kind: Literal["bars", "line", "line and points", "steps", "points", "crosses"] = "line and points"
    dashed: bool = False
    faint: bool = False
    error: Values | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, x_label, y_label: with units.
        series: in the order of the legend.
        y_scale: ``symlog`` is linear between plus and minus ``linear_within`` and logarithmic outside.
        y_range: None: as the points need it.
        level: a horizontal line, such as the dense model's value.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_scale: Literal["linear", "log", "symlog"] = "linear"
    linear_within: float = 1.0
    y_range: tuple[float, float] | None = None
    level: float | None = None


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: of its file.
        title: of the figure.
        description: what it shows and how to read it, in a sentence or two.
        panels: row by row.
        columns: panels in a row.
    """

    name: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    columns: int = 1

    @property
    def common_legend(self) -> bool:
        """Whether several panels have the same series."""
        return (
            len(self.panels) > 1 and len({tuple((s.name, s.color) for s in panel.series) for panel in self.panels}) == 1
        )
