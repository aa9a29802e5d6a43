"""What a process is set to, in processes of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tests.toy import REPO

CHURN = """
import mmap, resource
from ffprune.stages.environment import keep_memory

KEEP and print(keep_memory())
for _ in range(20):
    bytearray(40_000_000)  # zeros: every page of it is touched
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * mmap.PAGESIZE)
"""


def churn(keep: bool, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = CHURN.replace("KEEP", str(keep))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(REPO / "src"), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again() -> None:
    told, kept = churn(keep=True, MALLOC_ARENA_MAX="1")
    assert told == "True"
    assert int(kept) < 5 * 40_000_000
    (given_back,) = churn(keep=False, MALLOC_MMAP_THRESHOLD_="1000000")
    assert int(given_back) > 15 * 40_000_000


def test_who_has_set_the_c_library_is_left_alone() -> None:
    assert churn(keep=True, MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
