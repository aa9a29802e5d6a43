"""Progress of a long loop: a bar on a terminal, else one plain line at most every ten seconds."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

# The flow reads a stage's output through a pipe; by this variable it says that a terminal is behind it.
TERMINAL_VARIABLE = "FFPRUNE_TERMINAL"
_SECONDS_BETWEEN_LINES = 10.0


_LINE = re.compile(r"(?P<what>.+): (?P<done>\d+)/(?P<total>\d+), \d+ s(, \d+ s left)?(?P<shown> .*)?")


@dataclass(frozen=True)
class Step:
    """How far a loop has come, as its plain line says it; ``shown`` is what stands behind the numbers."""

    what: str
    done: int
    total: int
    shown: str


def read_line(line: str) -> Step | None:
    """The step that a plain line of :class:`Progress` tells of; None for any other line."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    return Step(found["what"], int(found["done"]), int(found["total"]), (found["shown"] or "").strip())


def on_terminal() -> bool:
    """Whether a person sees stderr."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL_VARIABLE) == "1"


class Progress:
    """A context manager; ``update(n, reward=..., perplexity=...)`` advances and shows the named values."""

    def __init__(self, total: int, description: str, done: int = 0) -> None:
        self.total, self.description = total, description
        self._done = self._started_with = done
        self._shown = ""
        self._bar: Any = None
        self._task: Any = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[shown]}"),
                console=Console(file=sys.stderr, force_terminal=True),
            )
            self._task = self._bar.add_task(self.description, total=self.total, completed=self._done, shown="")
            self._bar.start()
        return self

    def update(self, n: int = 1, **shown: float | str) -> None:
        """Advance by ``n``; keyword values stand beside the bar."""
        self._done += n
        if shown:
            self._shown = " ".join(f"{name} {_short(value)}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, advance=n, shown=self._shown)
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def advance_to(self, done: int, **shown: float | str) -> None:
        """Advance to ``done`` in all."""
        self.update(done - self._done, **shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        advanced = self._done - self._started_with
        left = f", {elapsed / advanced * (self.total - self._done):.0f} s left" if advanced else ""
        line = f"{self.description}: {self._done}/{self.total}, {elapsed:.0f} s{left} {self._shown}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
