"""Runs and registered models on a team's server: MLflow before a real PostgreSQL, which keeps all of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ffprune.stages.execution import summarise_execution
from ffprune.stages.registry import Pointer
from ffprune.stages.sections import Tracking
from ffprune.stages.tracking import Parent, StageRun, Store, open_store, start_parent
from tests.servers import answers, free_ports
from tests.toy import isolate, wait_until

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES is None, reason="needs PostgreSQL: apt-get install postgresql"),
]


@contextmanager
def postgresql() -> Iterator[str]:
    """A database server of the test's own; its address. PostgreSQL refuses to run as root."""
    # Not in pytest's folder, which none but its owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    assert BINARIES is not None
    (port,), root = free_ports(1), os.geteuid() == 0
    owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if root else []
    if root:
        shutil.chown(folder, "postgres", "postgres")
    data = folder / "data"
    subprocess.run(
        [*owner, BINARIES / "initdb", "-D", data, "-U", "ffprune", "--auth=trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    words = [BINARIES / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*owner, *words], stdout=log, stderr=subprocess.STDOUT, cwd="/")
    ready = [BINARIES / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
    try:
        assert wait_until(lambda: process.poll() is not None or subprocess.run(ready).returncode == 0, 60)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"postgresql://ffprune@127.0.0.1:{port}/postgres"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        process.wait(30)
        shutil.rmtree(folder)


@contextmanager
def mlflow_server(database: str, artifacts: Path, log: Path) -> Iterator[str]:
    """MLflow as docs/tracking.md starts it; its address."""
    (port,) = free_ports(1)
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", database, "--artifacts-destination", str(artifacts)]
    with log.open("ab") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        assert wait_until(lambda: process.poll() is not None or answers(f"{address}/health"), 120)
        assert process.poll() is None, log.read_text()[-3000:]
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Store]]:
    """Starts the server before the same database again and again; a store of it each time."""
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    with postgresql() as database, ExitStack() as servers:

        def start() -> Store:
            servers.close()
            address = servers.enter_context(mlflow_server(database, tmp_path / "artifacts", tmp_path / "server.log"))
            return open_store(Tracking(experiment="team", uri=address))

        yield start


def test_a_team_server_keeps_runs_figures_and_pointers(team: Callable[[], Store], tmp_path: Path) -> None:
    store = team()
    parent = start_parent(store, "ffprune run")
    run = StageRun(store, Parent(parent, owned=False), "search")
    run.params({"search": {"episodes": 3}})
    for step in range(700):
        run.metrics({"reward": step / 700}, step)
    run.table("policy.json", [{"unit": "layers.0.ffn", "retention": 0.8}])
    run.figure(Figure(), "policy.png")
    run.finish("FINISHED")
    summarise_execution(store, parent, {"search": "ran"})
    source = str(Pointer("models/repaired/0.2/searched+stream", "models/repaired", 32 * "a" + ".dir"))
    store.client.create_registered_model("Small-1")
    store.client.create_model_version("Small-1", source, run_id=run.run_id, await_creation_for=0)
    store.client.set_registered_model_alias("Small-1", "best", "1")

    again = team()
    found = again.client.get_run(run.run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"search.episodes": "3"})
    assert len(again.client.get_metric_history(run.run_id, "reward")) == 700
    assert {one.path for one in again.client.list_artifacts(run.run_id)} == {"policy.json", "policy.png"}
    assert list((tmp_path / "artifacts").rglob("policy.png")), "the server keeps artifacts, not the client"
    assert again.client.get_model_version_by_alias("Small-1", "best").source == source
    assert not (tmp_path / "mlruns" / "mlflow.db").exists()
