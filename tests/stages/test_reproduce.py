"""DVC's log lines, failures, and that no process stays behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ffprune.stages.lifeline import STARTER_VARIABLE
from ffprune.stages.reproduce import Output, Processes, Reproduced, failure_message, is_transient, reproduce
from tests.toy import alive, make_repo, wait_until

SLEEPER = f"stages:\n  slow: {{cmd: exec {shlex.quote(sys.executable)} sleeper.py, deps: [sleeper.py], outs: [x]}}\n"
# The stage ties itself to its parent as `ffprune STAGE` does.
SLEEPING = """
import os, pathlib, time
from ffprune.stages.lifeline import die_with_parent
die_with_parent()
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(120)
"""


def quiet() -> Output:
    return Output(lambda chunk: None, lambda line: None)


def stage_pid() -> int:
    assert wait_until(lambda: Path("pid").exists() and Path("pid").read_text() != "", 30)
    return int(Path("pid").read_text())


@pytest.mark.slow
def test_ran_cached_restored_and_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_repo(tmp_path, monkeypatch)
    assert reproduce("a", root, quiet(), Processes()) == Reproduced("ran")
    assert reproduce("a", root, quiet(), Processes()) == Reproduced("cached")
    Path("a.in").write_text("2")
    assert reproduce("a", root, quiet(), Processes()) == Reproduced("ran")
    Path("a.in").write_text("1")
    assert reproduce("a", root, quiet(), Processes()) == Reproduced("restored")
    assert reproduce("a", root, quiet(), Processes(), force=True) == Reproduced("ran")


@pytest.mark.slow
def test_a_failed_stage_gives_its_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "stages:\n  bad: {cmd: 'echo \"error: asked. possible. change.\" >&2; exit 2', outs: [x]}\n"
    root = make_repo(tmp_path, monkeypatch, command)
    assert reproduce("bad", root, quiet(), Processes()) == Reproduced("failed", "asked. possible. change.")


def test_an_unexpected_error_gives_the_last_line_of_its_traceback() -> None:
    lines = ["Traceback (most recent call last):", "ValueError: no", "ERROR: failed to reproduce 'x'"]
    assert failure_message(lines) == "ValueError: no"
    assert failure_message(lines[2:]) == "ERROR: failed to reproduce 'x'"


def test_what_may_pass_is_told_from_what_would_end_alike() -> None:
    def ended(status: int) -> list[str]:
        return [f"ERROR: failed to reproduce 'x': failed to run: ffprune x, exited with {status}"]

    assert is_transient(ended(75))
    assert is_transient(["ERROR: 'data/x' is busy, it is being blocked by:"])
    assert not any(is_transient(ended(status)) for status in (1, 2, 137, 143, 250))
    # A stage that only speaks of such a status does not have it.
    assert not is_transient(["something, exited with 75", *ended(2)])


def test_output_is_echoed_raw_and_logged_by_line() -> None:
    echoed: list[bytes] = []
    logged: list[str] = []
    output = Output(echoed.append, logged.append)
    output.feed(b"one\ntw")
    output.feed(b"o\n\x1b[2K1/3\r\x1b[2K3/3\r\nrest")
    output.close()
    assert b"".join(echoed) == b"one\ntwo\n\x1b[2K1/3\r\x1b[2K3/3\r\nrest"
    assert logged == ["one", "two", "3/3", "rest"]


@pytest.mark.slow
def test_ending_all_ends_the_stage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_repo(tmp_path, monkeypatch, SLEEPER)
    Path("sleeper.py").write_text(SLEEPING)
    found: list[Reproduced] = []
    processes = Processes()
    thread = threading.Thread(target=lambda: found.append(reproduce("slow", root, quiet(), processes)))
    thread.start()
    pid = stage_pid()
    processes.end()
    thread.join(20)
    assert [done.outcome for done in found] == ["stopped"]
    assert not alive(pid)
    # What waited for its turn does not begin behind it.
    assert reproduce("slow", root, quiet(), processes).outcome == "not run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_flow_leaves_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    make_repo(tmp_path, monkeypatch, SLEEPER)
    Path("sleeper.py").write_text(SLEEPING)
    flow = (
        "from pathlib import Path; from ffprune.stages.reproduce import Output, Processes, reproduce;"
        "reproduce('slow', Path.cwd(), Output(lambda chunk: None, lambda line: None), Processes())"
    )
    process = subprocess.Popen([sys.executable, "-c", flow])
    pid = stage_pid()
    os.kill(process.pid, number)
    process.wait(10)
    assert wait_until(lambda: not alive(pid), 10)


def test_a_process_whose_starter_is_gone_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    # As when the flow is killed while the stage's Python is starting.
    monkeypatch.setenv(STARTER_VARIABLE, "1")
    code = "from ffprune.stages.lifeline import die_with_parent; die_with_parent(); print('began')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 128 + signal.SIGTERM
    assert answer.stdout == ""
