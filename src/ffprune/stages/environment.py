"""What a process is set to before it works: no telemetry, files inside the project, memory that is used again."""

from __future__ import annotations

import ctypes
import os
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: What keeps libraries from reporting home.
QUIET_REPORTS = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_QUIET = {
    **QUIET_REPORTS,
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Workers without a GPU see what this process sees; Ray would warn that this is to become its default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait must not spin: beside other work, spinning made the many small products ten times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Written by `make ui` while its Prefect server is up.
SERVER_FILE = Path(".prefect") / "server.url"


def quieten() -> None:
    """Switch off every library's reports home and chatter, unless the user has said otherwise."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def keep_memory() -> bool:
    """Have the C library use freed memory again, where it would give it back to the system.

    A forward pass takes and frees blocks of many MB. glibc asks the system for each anew, which hands out its pages one
    by one, filled with zeros: 0.79 s in place of 0.66 for 1,022 tokens of the default model in bfloat16 on two cores.

    Returns:
        Whether this C library was told; glibc alone is, unless the user has.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return tell is not None and all(tell(*option) == 1 for option in (_MMAP_FROM, _TRIM_FROM))


# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h. Larger blocks, and more than this at the end of the heap, are given
# back as before; matrices below it may stay.
_MMAP_FROM = -3, 1 << 28
_TRIM_FROM = -1, 1 << 29


def share_of_threads(workers: int) -> dict[str, str]:
    """What a stage that runs beside others is told: its part of the processors, unless the user has said otherwise.

    On two cores, two models calibrated side by side took two thirds of the time that they took one after the other.
    """
    if workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}


def prepare_prefect(root: Path) -> bool:
    """Set Prefect's home and server; returns whether a server is up (else the flow starts its own)."""
    os.environ.setdefault("PREFECT_HOME", str(root / ".prefect"))
    # The default of 20 s is short for a busy or slow machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # The flow prints its own lines; Prefect's would say everything twice. Its pages still get them all.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if os.environ.get("PREFECT_API_URL"):
        return True
    url = _server_of(root / SERVER_FILE)
    if url is None:
        return False
    os.environ["PREFECT_API_URL"] = url
    return True


def _server_of(file: Path) -> str | None:
    """The address in the file when a server answers there; a crashed one leaves the file behind."""
    if not file.is_file():
        return None
    url = file.read_text().strip()
    return url if answers(f"{url}/health", 1) else None


def answers(url: str, seconds: float) -> bool:
    """Whether a server answers a request for this address well, in time."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def in_time(look: Callable[[], T], seconds: float) -> T:
    """What a call returns or raises, where it does so in time; one that does not is left to itself.

    Raises:
        TimeoutError: it has not ended after ``seconds``.
    """
    told: Future[T] = Future()

    def work() -> None:
        try:
            told.set_result(look())
        except BaseException as error:
            told.set_exception(error)

    # A daemon thread: what never answers must not keep the process from ending.
    threading.Thread(target=work, daemon=True).start()
    try:
        return told.result(seconds)
    except TimeoutError as error:
        if told.done():  # the call's own
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from error
