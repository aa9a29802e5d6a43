"""Progress of a long loop: a bar on a terminal, else one plain line at most every ten seconds."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from ffprune.allocate.problem import Standing

# The flow reads a stage's output through a pipe; by this variable it says that a terminal is behind it.
TERMINAL_VARIABLE = "FFPRUNE_TERMINAL"
_SECONDS_BETWEEN_LINES = 10.0
_SHORT = 3.0
"""Seconds; a loop that takes less prints no line."""
_MEGABYTE = 1_000_000

_LINE = re.compile(r"(?P<what>.+): (?P<done>\d+)/(?P<total>\d+), \d+ s(, [\d.]+/s)?(, \d+ s left)?(?P<shown> .*)?")


@dataclass(frozen=True)
class Step:
    """How far a loop has come, as its plain line says it; ``shown`` is what stands behind the numbers."""

    what: str
    done: int
    total: int
    shown: str


def read_line(line: str) -> Step | None:
    """The step that a plain line of :class:`Progress` tells of; None for other lines, and where no end is known."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    return Step(found["what"], int(found["done"]), int(found["total"]), (found["shown"] or "").strip())


def on_terminal() -> bool:
    """Whether a person sees stderr."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL_VARIABLE) == "1"


class Progress:
    """A context manager; ``update(n, reward=..., perplexity=...)`` advances and shows the named values.

    Plain lines come between updates too: a step may take longer than the ten seconds from line to line.

    Args:
        total: steps in all; 0 while that is not known.
        description: what the loop does.
        done: steps that were done before.
    """

    def __init__(self, total: int, description: str, done: int = 0) -> None:
        self.description = description
        self._total = total
        self._done = self._started_with = done
        self._shown = ""
        self._bar: Any = None
        self._task: Any = None
        self._started = self._printed = time.monotonic()
        # Inside the loop a noisy library's stderr may be redirected to nowhere.
        self._out = sys.stderr
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._beat: threading.Thread | None = None

    @property
    def total(self) -> int:
        """Steps in all; 0 while that is not known."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total or None)

    def __enter__(self) -> Self:
        self._out = sys.stderr
        if on_terminal():
            self._start_bar()
        else:
            self._beat = threading.Thread(target=self._keep_printing, daemon=True)
            self._beat.start()
        return self

    def update(self, n: int = 1, **shown: float | str) -> None:
        """Advance by ``n``; keyword values stand beside the bar."""
        self._done += n
        if shown:
            self._shown = " ".join(f"{name} {_short(value)}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, advance=n, shown=self._shown, rate=self._rate(), left=self._left())
        else:
            self._print_if_due()

    def advance_to(self, done: int, **shown: float | str) -> None:
        """Advance to ``done`` in all."""
        self.update(done - self._done, **shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            # One that another took the place of before its first step.
            self._bar.update(self._task, visible=error is not None or not self._total or self._advanced > 0)
            self._bar.stop()
            return
        self._ended.set()
        if self._beat is not None:
            self._beat.join()
        if self._printed > self._started or time.monotonic() - self._started >= _SHORT:
            self._print_line()

    @property
    def _advanced(self) -> int:
        return self._done - self._started_with

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            # Rich's own forgets steps that took more than half a minute.
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[shown]}"),
            console=Console(file=self._out, force_terminal=True),
        )
        self._task = self._bar.add_task(
            self.description, total=self._total or None, completed=self._done, shown="", rate="", left=""
        )
        self._bar.start()

    def _keep_printing(self) -> None:
        while not self._ended.wait(max(0.1, self._printed + _SECONDS_BETWEEN_LINES - time.monotonic())):
            self._print_if_due()

    def _print_if_due(self) -> None:
        with self._lock:
            if time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
                self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        count = f"{self._done}/{self._total}" if self._total else str(self._done or "")
        told = (count, f"{elapsed:.0f} s", self._rate(), self._left())
        line = f"{self.description}: {', '.join(part for part in told if part)} {self._shown}"
        print(line.rstrip(), file=self._out, flush=True)

    def _left(self) -> str:
        """Time to the end, such as ``20 s left``; empty before the first step, and where no end is known."""
        if not self._total or self._advanced <= 0:
            return ""
        elapsed = time.monotonic() - self._started
        return f"{elapsed / self._advanced * (self._total - self._done):.0f} s left"

    def _rate(self) -> str:
        """Steps a second since the start, such as ``0.93/s``; empty before the first."""
        elapsed = time.monotonic() - self._started
        if self._advanced <= 0 or elapsed <= 0:
            return ""
        rate = self._advanced / elapsed
        # Two figures, never an exponent.
        decimals = max(0, 1 - math.floor(math.log10(rate)))
        shown = f"{rate:.{decimals}f}"
        return f"{shown.rstrip('0').rstrip('.') if decimals else shown}/s"


class Bars(ExitStack):
    """Bars of a stage, one after the other: the next ends the one before.

    Args:
        make: makes a bar of a total, a description and what was done before.
    """

    def __init__(self, make: Callable[[int, str, int], Progress]) -> None:
        super().__init__()
        self._make = make
        self._bar: Progress | None = None

    def at(self, description: str, total: int, done: int = 0, anew: bool = False) -> Progress:
        """The bar of this description, a new one where another stood or ``anew`` says so."""
        if anew or self._bar is None or description != self._bar.description:
            self.close()
            self._bar = self.enter_context(self._make(total, description, done))
        return self._bar

    def race(self, description: str, standing: Standing) -> None:
        """Show how far a race of candidates is."""
        bar = self.at(description, standing.most, anew=standing.starts)
        bar.total = standing.most
        if standing.best:
            bar.advance_to(standing.read, best=standing.best, perplexity=min(standing.perplexity, 1e9))
        else:
            bar.advance_to(standing.read)

    def steps(self, description: str, total: int = 0) -> Callable[[int, int], None]:
        """A bar of steps; to be told of steps done and in all."""
        bar = self.at(description, total, anew=True)

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.advance_to(done)

        return show

    def megabytes(self, description: str, **shown: str) -> Callable[[int, int], None]:
        """A bar of bytes, in megabytes; to be told of bytes that are here and in all, 0 while that is not known."""
        bar = self.at(f"{description} (MB)", 0, anew=True)
        bar.update(0, **shown)

        def show(done: int, total: int) -> None:
            here, bar.total = round(done / _MEGABYTE), round(total / _MEGABYTE)
            # What is announced is rounded, and may be less than comes.
            bar.advance_to(min(here, bar.total) if bar.total else here)

        return show


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
