"""What a stage function is given: parameters, paths, a progress bar, a place to log, a checkpoint folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol, cast

from ffprune.stages.lineage import fingerprint
from ffprune.stages.params import Scoped
from ffprune.stages.progress import Progress
from ffprune.stages.record import Stage, covers
from ffprune.stages.sections import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class UndeclaredPath(Exception):
    """A stage touched a path that its record does not declare, so DVC would not know about it."""


class Sink(Protocol):
    """Where a stage's numbers go: a run in MLflow, or nowhere (:class:`Nowhere`)."""

    run_id: str | None

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """One point per name."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def figure(self, figure: Any, name: str) -> None:
        """Store a figure."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows."""

    def dict(self, value: Mapping[str, Any], name: str) -> None:
        """Store a JSON file."""

    def file(self, path: Path) -> None:
        """Store a copy of a file under its own name."""


class Nowhere:
    """A sink that keeps nothing, for a stage called directly."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""

    def figure(self, figure: Any, name: str) -> None:
        """Nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def dict(self, value: Mapping[str, Any], name: str) -> None:
        """Nothing."""

    def file(self, path: Path) -> None:
        """Nothing."""


class StageContext:
    """Everything a stage may use of the world outside; paths are relative to the current folder.

    Args:
        stage: the stage's record.
        params: the whole of params.yaml; the stage sees its declared sections.
        sink: where numbers go.

    Attributes:
        workers: how many processes try policies; no section to declare, since no result depends on it.
    """

    def __init__(self, stage: Stage, params: Params, sink: Sink | None = None) -> None:
        self.stage, self.workers = stage, params.workers
        self._given = params
        scoped = Scoped(params, stage.params, f"the stage '{stage.name}'")
        self.params = cast(Params, scoped)
        self.param_values = scoped.values()
        self.deps = tuple(path for dep in stage.deps for path in resolve(dep, self.param_values))
        self._sink: Sink = sink if sink is not None else Nowhere()
        self._checkpoints: Path | None = None

    def __reduce__(self) -> tuple[type[StageContext], tuple[Stage, Params]]:
        """A worker's copy; its numbers go nowhere."""
        return type(self), (self.stage, self._given)

    def path(self, name: str) -> Path:
        """A declared input or output (or something inside it).

        Raises:
            UndeclaredPath: the record names nothing that covers it.
        """
        declared = (*self.deps, *self.stage.written)
        if not any(covers(known, PurePath(name)) for known in declared):
            raise UndeclaredPath(
                f"the stage '{self.stage.name}' uses {name} without declaring it: "
                f"add it to ffprune/stages/record.py and dvc.yaml (declared: {', '.join(declared)})"
            )
        return Path(name)

    def progress(self, total: int, description: str, done: int = 0) -> Progress:
        """A progress bar: ``with ctx.progress(100, "search") as bar: bar.update(reward=0.8)``."""
        return Progress(total, description, done)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add one point to the curve of every name."""
        self._sink.metrics(values, step)

    def log_curve(self, name: str, values: Iterable[float], start: int = 0) -> None:
        """A whole curve; the first value stands at step ``start``."""
        for step, value in enumerate(values, start):
            self._sink.metrics({name: value}, step)

    def log_figure(self, figure: Figure, name: str) -> None:
        """A matplotlib figure, for example as ``policy.png``."""
        self._sink.figure(figure, name)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as a table, for example as ``policy.json``."""
        self._sink.table(name, rows)

    def log_dict(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file, for example as ``problem.json``."""
        self._sink.dict(value, name)

    def log_file(self, path: Path) -> None:
        """A copy of a file that the stage has written, for example of ``report.html``."""
        self._sink.file(path)

    def set_tags(self, **tags: str) -> None:
        """Short texts to find the run by."""
        self._sink.tags(tags)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder for checkpoints of exactly this computation; it outlives a kill and goes after success."""
        if self._checkpoints is None:
            key = fingerprint(self.param_values, self.deps)
            self._checkpoints = Path(".ckpt") / self.stage.name / key
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        return self._checkpoints


def resolve(template: str, values: Mapping[str, Any]) -> list[str]:
    """A path with ``${section.key}`` replaced by the parameter, as DVC does it; one of several paths gives them all."""
    asked = re.search(r"\$\{(.+)\}", template)
    if asked is None:
        return [template]
    found: Any = values
    for part in asked[1].split("."):
        found = found[part]
    parts = found.values() if isinstance(found, Mapping) else [found]
    return [template.replace(asked[0], str(part)) for part in parts]
