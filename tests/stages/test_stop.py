"""Ctrl-C in a search, as people press it: it ends at once, and goes on later from where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.stages.artifacts import read_metadata
from ffprune.stages.context import StageContext
from ffprune.stages.params import load_params
from ffprune.stages.record import SEARCH_POLICY, stage_named
from ffprune.stages.run import call
from tests.stages.tiny_project import defaults, merged, write_sources
from tests.tiny import llama
from tests.toy import isolate, wait_until

pytestmark = pytest.mark.slow


def checkpoint() -> list[Any]:
    """The trials that a stopped search has kept."""
    files = list(Path(".ckpt/search").glob("*/search.safetensors"))
    return json.loads(read_metadata(files[0])["episodes"]) if files else []


def stopped_with_more_than(known: int) -> tuple[float, int]:
    """Search until more trials are kept, press Ctrl-C; seconds until the process was gone, and its status."""
    # A test run started in the background ignores SIGINT, and so would everything that it starts.
    process = subprocess.Popen(
        [sys.executable, "-m", "ffprune", "search"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert wait_until(lambda: len(checkpoint()) > known, 120)
        started = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        return (process.wait(30), time.monotonic() - started)[::-1]
    finally:
        process.kill()


def test_a_search_ends_within_two_seconds_and_goes_on_from_its_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    with_database()
    write_sources(tmp_path, llama())
    with Path("params.yaml").open("w") as file:
        YAML().dump(merged(defaults(), {"search": {"episodes": 2000}}), file)
    params = load_params()
    for name in ("download", "calibrate", "sensitivity", "levels", "latency"):
        stage = stage_named(name)
        call(stage, StageContext(stage, params))
    seconds, status = stopped_with_more_than(0)
    assert status == 130
    assert seconds < 2
    first = checkpoint()
    assert not Path(SEARCH_POLICY).exists()
    stopped_with_more_than(len(first))
    # The same trials, and more of them.
    assert checkpoint()[: len(first)] == first
