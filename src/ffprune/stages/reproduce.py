"""One stage through DVC, in a process of its own: what became of it, and no process left behind.

In-process reproduction is no alternative: DVC's locks know an owner by process, so two threads would run one
stage twice.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ffprune.stages.execution import Outcome
from ffprune.stages.exit_status import TRY_AGAIN
from ffprune.stages.lifeline import STARTER_VARIABLE
from ffprune.stages.progress import TERMINAL_VARIABLE

_GRACE_SECONDS = 10.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Reproduced:
    """What became of a stage; when it came to no result, why not, and whether another attempt may help."""

    outcome: Outcome
    message: str = ""
    transient: bool = False


class Processes:
    """The stages that a run has started and not yet seen end.

    Attributes:
        stopped: set once :meth:`end` was called.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def start(self, words: list[str], root: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Start a process in a session of its own, its output in one pipe.

        None when the run was stopped: a stage that waited for its turn must not begin behind a Ctrl-C.
        """
        with self._lock:
            if self.stopped.is_set():
                return None
            process = subprocess.Popen(
                words,
                cwd=root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._live.add(process)
        return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """It has ended."""
        with self._lock:
            self._live.discard(process)

    def end(self) -> None:
        """End every process, with all that it has started."""
        with self._lock:
            self.stopped.set()
            processes = list(self._live)
        for process in processes:
            _end(process)


class Output:
    """Splits a process's output: bytes as they come to the terminal, whole lines to the log."""

    def __init__(self, echo: Callable[[bytes], None], log: Callable[[str], None]) -> None:
        self._echo, self._log = echo, log
        self._rest = b""
        self.lines: list[str] = []

    def feed(self, chunk: bytes) -> None:
        """Take the next piece of output."""
        self._echo(chunk)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for line in whole:
            self._take(line)

    def close(self) -> None:
        """Take what is left without a line end."""
        self._take(self._rest)
        self._rest = b""

    def _take(self, line: bytes) -> None:
        # A progress bar redraws its line after a carriage return; the last state is the one worth keeping.
        text = _ESCAPES.sub("", line.decode(errors="replace")).rstrip("\r").rpartition("\r")[2].rstrip()
        if text:
            self.lines.append(text)
            self._log(text)


def reproduce(
    name: str,
    root: Path,
    output: Output,
    processes: Processes,
    *,
    force: bool = False,
    terminal: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Reproduced:
    """Run ``dvc repro --single-item NAME`` and classify what it did.

    ``--wait-for-lock`` is not optional: without it a stage that ends while another process hashes a large
    output loses its finished result.
    """
    words = [sys.executable, "-m", "ffprune.stages.lifeline", "--wait-for-lock", "repro", "--single-item"]
    environment = {**os.environ, **(variables or {}), TERMINAL_VARIABLE: "1" if terminal else "0"}
    environment[STARTER_VARIABLE] = str(os.getpid())
    process = processes.start([*words, *(["--force"] if force else []), name], root, environment)
    if process is None:
        return Reproduced("not run", "the run was stopped before this stage began")
    try:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            output.feed(chunk)
        output.close()
        status = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
        processes.forget(process)
    if status != 0 and processes.stopped.is_set():
        return Reproduced("stopped", "the run was stopped while this stage ran")
    if status != 0:
        return Reproduced("failed", failure_message(output.lines), is_transient(output.lines))
    return Reproduced(classify(name, output.lines))


def classify(name: str, lines: list[str]) -> Outcome:
    """Read DVC's log lines: its return values cannot tell a stage that ran from one restored.

    Raises:
        RuntimeError: none of the known lines is there.
    """
    text = "\n".join(lines)
    if f"Running stage '{name}':" in text:
        return "ran"
    if f"Stage '{name}' is cached - skipping run" in text or "Pulling data for" in text:
        return "restored"
    if f"'{name}' didn't change, skipping" in text:
        return "cached"
    raise RuntimeError(f"dvc ended well but did not say what became of '{name}': {text[-500:]}")


def failure_message(lines: list[str]) -> str:
    """The stage's own message: its refusal, or the last line of its traceback, else what DVC said."""
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Warning)\b", line)]
    dvc = [line for line in lines if line.startswith("ERROR: ")]
    return (raised or dvc or lines or ["no output"])[-1]


def is_transient(lines: list[str]) -> bool:
    """Whether the same command may go well later: the stage said so by its status, or DVC's locks were taken.

    A refusal (status 2), an unexpected error and a stage that was killed are not: they would end alike.
    """
    dvc = [line for line in lines if line.startswith("ERROR: ")]
    said = (f", exited with {TRY_AGAIN}", "is busy, it is being blocked by", "Unable to acquire lock")
    return any(phrase in line for line in dvc for phrase in said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to dvc and its stage together, SIGKILL to what is left after a while."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
