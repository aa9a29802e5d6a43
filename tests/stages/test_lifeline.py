"""A process that is told to end clears away what it was at, however often it is told."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

LEAVING = """
import sys, time
from pathlib import Path
from ffprune.stages.lifeline import leave_on_sigterm
leave_on_sigterm()
try:
    print("began", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.5)
    Path(sys.argv[1]).touch()
"""


def test_a_second_sigterm_does_not_end_what_the_first_has_clearing_away(tmp_path: Path) -> None:
    done = tmp_path / "cleared"
    with subprocess.Popen([sys.executable, "-c", LEAVING, done], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert done.exists()
