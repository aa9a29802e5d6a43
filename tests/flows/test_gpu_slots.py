"""Stages of one run on made-up GPUs: who gets which, and who waits. No process is started."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ffprune.stages.devices import VARIABLE, Slots
from ffprune.stages.graph import Plan
from ffprune.stages.lanes import Lanes
from ffprune.stages.reproduce import Reproduced
from tests.flows.modules import load


def test_two_gpus_serve_two_searches_and_the_report_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("flows/pipeline.py", monkeypatch)
    given: dict[str, str | None] = {}
    now: list[str] = []
    met = threading.Barrier(3)
    lock = threading.Lock()

    def pretend(name: str, *rest: Any, variables: Mapping[str, str], **options: Any) -> Reproduced:
        with lock:
            given[name] = variables.get(VARIABLE)
            if name.startswith("method"):
                assert given[name] not in now
                now.append(str(given[name]))
        met.wait(20)  # two searches and one stage without a GPU are under way together
        with lock:
            if name.startswith("method"):
                now.remove(str(given[name]))
        return Reproduced("ran")

    monkeypatch.setattr(module, "reproduce", pretend)
    searches = [f"method@{number}" for number in range(4)]
    plan = Plan(dict.fromkeys([*searches, "report", "download"], ()), frozenset([*searches, "report", "download"]))
    execution = module.Execution(Path.cwd(), plan, "parent", False, Lanes(6, lambda: 0), Slots(["0", "1"]))
    with ThreadPoolExecutor(6) as pool:
        # The report goes with the first two searches, the download with the others.
        names = [*searches[:2], "report"]
        first = [pool.submit(execution.settle, name) for name in names]
        assert all(future.result(30).is_completed() for future in first)
        second = [pool.submit(execution.settle, name) for name in [*searches[2:], "download"]]
        assert all(future.result(30).is_completed() for future in second)
    assert {given[name] for name in searches[:2]} == {given[name] for name in searches[2:]} == {"0", "1"}
    assert given["report"] is given["download"] is None
