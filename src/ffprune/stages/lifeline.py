"""No orphans: a process that ends itself when the one that started it is gone.

DVC does not pass signals on, so a killed ``dvc`` would leave its stage writing where the next run writes too.
``python -m ffprune.stages.lifeline ARGUMENTS`` is ``dvc ARGUMENTS`` tied to the flow in this way.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from types import FrameType

# The process id of whoever starts this one: without it, a parent that ends while Python is starting goes unnoticed.
STARTER_VARIABLE = "FFPRUNE_STARTED_BY"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, and turn SIGTERM into an orderly exit."""
    leave_on_sigterm()
    follow_parent()


def leave_on_sigterm() -> None:
    """End in order at SIGTERM: what was to be done at exit is done, which Python by itself leaves out."""
    signal.signal(signal.SIGTERM, _leave)


def follow_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends.

    Only Linux has this; elsewhere a killed parent is noticed by nobody.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.pop(STARTER_VARIABLE, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        # It ended before the kernel was asked, so no signal will come.
        sys.exit(128 + signal.SIGTERM)


def hasten_exit() -> None:
    """Leave what this process holds to the kernel; files and servers are still closed, by their own handlers.

    Without it Python takes apart every object of torch and transformers first, for seconds behind a Ctrl-C.
    """
    gc.disable()
    gc.freeze()


def _leave(number: int, frame: FrameType | None) -> None:
    # A second one, such as that of a starter that has gone before, must not end what the first has clearing away.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    die_with_parent()
    os.environ[STARTER_VARIABLE] = str(os.getpid())
    from dvc.cli import main

    sys.exit(main(sys.argv[1:]))
