"""A small DVC repository in a temporary folder, cut off from the project's own state."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).parent.parent
DVC = [sys.executable, "-m", "dvc"]
#: Variables of the person or job that runs the tests, which nothing that these start may see.
SETTINGS = ("DVC_", "FFPRUNE_", "MLFLOW_", "PREFECT_")
DIAMOND = """
stages:
  a: {cmd: "echo made > a.txt", deps: [a.in], outs: [a.txt]}
  b: {cmd: "cat a.txt > b.txt; echo b >> b.txt", deps: [a.txt], outs: [b.txt]}
  c: {cmd: "cat a.txt > c.txt; echo c >> c.txt", deps: [a.txt, c.in], outs: [c.txt]}
  d: {cmd: "cat b.txt c.txt > d.txt", deps: [b.txt, c.txt], outs: [d.txt]}
"""


def make_repo(folder: Path, monkeypatch: pytest.MonkeyPatch, pipeline: str = DIAMOND) -> Path:
    """A repository without git whose stages are shell lines; it becomes the current folder."""
    monkeypatch.chdir(folder)
    isolate(monkeypatch)
    from dvc.repo import Repo  # as `dvc init --no-scm`, without the seconds that a process takes to import DVC

    Repo.init(no_scm=True).close()
    Path("dvc.yaml").write_text(pipeline)
    Path("a.in").write_text("1")
    Path("c.in").write_text("1")
    shutil.copy(REPO / "params.yaml", folder / "params.yaml")
    shutil.copytree(REPO / "flows", "flows", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the person or job that runs the tests reaches what they start."""
    for name in list(os.environ):
        if name.startswith(SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("SHELL", "/bin/sh")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process works; one that has ended and waits to be collected does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
