"""One run a folder, and exit statuses that say what may be tried again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ffprune.core.errors import FfpruneError, MissingInput, NoNetwork, ParameterError, WorkersLost
from ffprune.stages.exclusive import RunInProgress, only_run
from ffprune.stages.exit_status import status_of
from ffprune.stages.tracking import TrackingBusy, TrackingUnavailable


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with only_run(tmp_path), pytest.raises(RunInProgress, match=rf"process {os.getpid()} .*Ctrl-C"), only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass


def test_other_folders_are_free(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    with only_run(tmp_path), only_run(tmp_path / "study"):
        pass


def test_a_killed_run_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ffprune.stages.exclusive import only_run\n"
        "with only_run(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunInProgress, match=str(holder.pid)), only_run(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    with only_run(tmp_path):
        pass


def test_statuses_say_what_may_be_tried_again() -> None:
    def status(kind: type[FfpruneError]) -> int:
        return status_of(kind("asked", "possible", "change"))

    assert {status(kind) for kind in (NoNetwork, WorkersLost, TrackingBusy, RunInProgress)} == {75}
    assert {status(kind) for kind in (ParameterError, MissingInput, TrackingUnavailable)} == {2}
