"""The deployments of prefect.yaml on a server with a worker, as docs/scheduling.md has them typed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ffprune.stages.params import load_params
from tests.servers import free_ports
from tests.toy import REPO, alive, make_repo, wait_until

pytestmark = pytest.mark.slow
PREFECT = [sys.executable, "-m", "prefect"]
TIE = "from ffprune.stages.lifeline import die_with_parent as d; d(); import time; time.sleep(300)"
STAGES = f"""
stages:
  quick: {{cmd: "echo 'error: no network' >&2; test -f tried && echo made > x || (touch tried; exit 75)", outs: [x]}}
  slow: {{cmd: "echo $$ > pid; exec {shlex.quote(sys.executable)} -c '{TIE}'", deps: [x], outs: [y]}}
"""


def prefect(*words: str) -> str:
    answer = subprocess.run([*PREFECT, *words], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@contextmanager
def staying(*words: str) -> Iterator[None]:
    """A server or a worker, ended with everything that it has started."""
    with Path(f"{words[0]}.log").open("w") as log:
        process = subprocess.Popen([*PREFECT, *words], stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(path: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"{os.environ['PREFECT_API_URL']}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def up() -> bool:
    try:
        return bool(ask("/health"))
    except OSError:
        return False


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None], prefect_home: Path
) -> Iterator[None]:
    make_repo(tmp_path, monkeypatch, STAGES)
    with_database()
    shutil.copy(REPO / "prefect.yaml", tmp_path)
    port = str(free_ports(1)[0])
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    with staying("server", "start", "--host", "127.0.0.1", "--port", port):
        assert wait_until(up, 120), Path("server.log").read_text()
        yield


def test_a_deployed_run_is_tried_again_cancelled_and_tells_the_truth(server: None) -> None:
    for pool in ("cpu", "gpu"):
        prefect("work-pool", "create", pool, "--type", "process", "--overwrite")
    prefect("--no-prompt", "deploy", "--all")
    assert not ask("/deployments/name/prune-pipeline/nightly")["schedules"][0]["active"]
    with staying("worker", "start", "--pool", "cpu"):
        run = ask(
            f"/deployments/{ask('/deployments/name/prune-pipeline/nightly')['id']}/create_flow_run",
            parameters={"workers": 2, "params": {"search.sparsity": 0.25}},
        )["id"]
        assert wait_until(lambda: Path("pid").exists() and Path("pid").read_text() != "", 180), log()
        stage = int(Path("pid").read_text())
        prefect("flow-run", "cancel", run)
        assert wait_until(lambda: not alive(stage), 20), log()
        assert wait_until(lambda: ask(f"/flow_runs/{run}")["state"]["type"] == "CANCELLED", 60), log()
    tasks = ask("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
    found = {task["name"].rpartition("-")[0]: (task["state"]["name"], task["run_count"]) for task in tasks}
    assert load_params().search.sparsity == 0.25
    # The first was tried twice; the second did not fail, it was stopped.
    assert found == {"quick": ("Completed", 2), "slow": ("Cancelled", 1)}


def log() -> str:
    return Path("worker.log").read_text()[-3000:]
