"""Every drawing by name: how it is made, when there is something to draw, its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from ffprune.stages.exhibits import bars, lines, retentions, traces
from ffprune.stages.exhibits.results import Subject


@dataclass(frozen=True)
class Drawing:
    """A kind of figure.

    Attributes:
        draw: makes it.
        has: whether there is something to draw.
        points: its numbers for a CSV file, where the table's cells are not its numbers.
    """

    draw: Callable[[Subject], Figure]
    has: Callable[[Subject], bool]
    points: Callable[[Subject], list[dict[str, object]]] = lambda subject: []

    def titled(self, subject: Subject) -> Figure:
        """The figure under its title."""
        figure = self.draw(subject)
        figure.suptitle(subject.title, fontsize=11)
        return figure


def _finite(subject: Subject) -> bool:
    return any(subject.ratio(m.result) is not None for m in subject.measured)


def _filled(key: str) -> Callable[[Subject], bool]:
    return lambda subject: any(m.result[key] for m in subject.measured)


DRAWINGS: dict[str, Drawing] = {
    "perplexity": Drawing(bars.perplexity, _finite),
    "zero_shot": Drawing(bars.zero_shot, _filled("zero_shot")),
    "cost": Drawing(lines.cost, _finite),
    "compression": Drawing(lines.compression, _finite),
    "sweep": Drawing(lines.sweep, _finite),
    "policy": Drawing(retentions.policy, _filled("policy"), retentions.policy_points),
    "search_policies": Drawing(retentions.search_policies, _filled("policies"), retentions.search_policy_points),
    "samples": Drawing(lines.samples, _finite),
    "search": Drawing(lines.search, _filled("episodes"), lines.search_points),
    "speed": Drawing(bars.speed, _filled("speed")),
    "layer_traces": Drawing(traces.layer_traces, lambda subject: bool(subject.traces), traces.trace_points),
    "matrix_traces": Drawing(traces.matrix_traces, lambda subject: bool(subject.traces), traces.trace_points),
}
