"""One active run a folder: two would reproduce the same stage at the same time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffprune.core.errors import FfpruneError

_LOCK = Path(".ckpt") / "run.lock"


class RunInProgress(FfpruneError):
    """Another run of the pipeline is active in this folder."""


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one run; the kernel lets go of it when the process ends, however it ends.

    Raises:
        RunInProgress: somebody else holds it.
    """
    file = folder / _LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunInProgress(
                f"a run was to start in {folder}, where process {lock.read() or 'unknown'} is running the pipeline",
                "a folder has one active run; studies have folders of their own",
                "wait for it, cancel it (Ctrl-C, or Prefect's page), or use another clone",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
