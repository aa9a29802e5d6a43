"""MLflow: one parent run per pipeline execution, a child run per stage that ran.

The store is SQLite in mlruns/ beside dvc.yaml unless another is named. One that cannot be opened stops a
stage before it works; one that fails later costs the record, never the hours of a search.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffprune.core.errors import FfpruneError
from ffprune.stages.environment import in_time
from ffprune.stages.lineage import git_state, repository
from ffprune.stages.sections import Tracking

PARENT_VARIABLE = "FFPRUNE_PARENT_RUN"
_EXECUTION_TAG = "ffprune.execution"
#: Those of MLflow beside SQLite.
_DATABASES = ("postgresql", "mysql", "mssql")
_PATIENCE_SECONDS = 10.0


class TrackingUnavailable(FfpruneError):
    """The place where runs are recorded cannot be used."""


class TrackingBusy(TrackingUnavailable):
    """Another process holds the database's lock for longer than SQLite waits."""


@dataclass(frozen=True)
class Store:
    """An opened MLflow store and the experiment in it."""

    client: Any
    experiment_id: str


@dataclass(frozen=True)
class Parent:
    """The parent run of this execution; ``owned`` says that no flow will end it."""

    run_id: str
    owned: bool


def workspace() -> Path:
    """The repository: DVC names it inside a stage (also in a temporary experiment), else the one of this folder."""
    return Path(os.environ.get("DVC_ROOT") or repository(Path.cwd())).absolute()


def store_uri(settings: Tracking) -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, else ``tracking.uri``, else SQLite in mlruns/."""
    local = f"sqlite:///{workspace() / 'mlruns' / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.uri or local


def shown_uri(uri: str) -> str:
    """An address without its password."""
    return re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1:***@", uri)


def reach_database(uri: str, seconds: float) -> None:
    """Connect once to a database other than SQLite; addresses of other kinds pass.

    Raises:
        Exception: whatever its driver says, and TimeoutError when it has not answered after ``seconds``.
    """
    if not is_database(uri):
        return
    import sqlalchemy

    def connect() -> None:
        engine = sqlalchemy.create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()

    in_time(connect, seconds)


def is_database(uri: str) -> bool:
    """Whether an address is that of a database server, such as postgresql+psycopg://host/name."""
    return uri.partition(":")[0].partition("+")[0] in _DATABASES


def open_store(settings: Tracking) -> Store:
    """Connect, creating the database and the experiment when they are new.

    Raises:
        TrackingUnavailable: the address cannot be used (:class:`TrackingBusy`: not now).
    """
    # A dead server or database must be noticed in seconds; MLflow's own patience is minutes. For databases it has no
    # setting, so they are asked first, before the lock that others would wait for.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    uri = store_uri(settings)
    try:
        reach_database(uri, _PATIENCE_SECONDS)
        with nullcontext() if uri.startswith("http") else _one_at_a_time():
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            return Store(client, _experiment(client, settings.experiment, uri))
    except Exception as error:
        refusal = TrackingBusy if "database is locked" in str(error) else TrackingUnavailable
        said = " ".join(str(error).split())[:300].replace(uri, shown_uri(uri))
        raise refusal(
            f"runs were to be recorded at {shown_uri(uri)}: {said}",
            "a database (sqlite:///...) or a running MLflow server (http://...) can be used",
            "set tracking.uri in params.yaml to null (SQLite in mlruns/) or to an address that answers",
        ) from error


def start_parent(store: Store, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Create the parent run of one execution; returns its id."""
    every = {"ffprune.kind": "execution", **git_state(workspace()), **(tags or {})}
    return str(store.client.create_run(store.experiment_id, tags=every, run_name=name).info.run_id)


def find_parent(store: Store) -> Parent:
    """The flow's run, the run shared by the stages of one ``dvc repro``, or a run of this stage's own."""
    given = os.environ.get(PARENT_VARIABLE)
    if given:
        return Parent(given, owned=False)
    key = _dvc_process()
    if key is None:
        return Parent(start_parent(store, "ffprune"), owned=True)
    with _one_at_a_time():
        known = store.client.search_runs(
            [store.experiment_id], filter_string=f"tags.`{_EXECUTION_TAG}` = '{key}'", max_results=1
        )
        if known:
            store.client.update_run(known[0].info.run_id, status="RUNNING")
            return Parent(known[0].info.run_id, owned=True)
        return Parent(start_parent(store, "dvc repro", {_EXECUTION_TAG: key}), owned=True)


class StageRun:
    """The child run of one stage. Numbers are buffered: 300 single writes take ten times as long as one."""

    _FLUSH_AT, _FLUSH_SECONDS = 300, 10.0

    def __init__(self, store: Store, parent: Parent, stage: str) -> None:
        self._client, self._parent = store.client, parent
        tags = {"mlflow.parentRunId": parent.run_id, "ffprune.stage": stage, **git_state(workspace())}
        run = self._client.create_run(store.experiment_id, tags=tags, run_name=stage)
        self.run_id: str | None = str(run.info.run_id)
        self.parent_id = parent.run_id
        self._buffer: list[Any] = []
        self._flushed_at = time.monotonic()
        self._broken = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record load and memory of the machine meanwhile, a sample every ten seconds (GPUs: with nvidia-ml-py)."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow gives it no types. It has a thread of its own, which gives up by itself when the store fails.
        watching: Any = SystemMetricsMonitor
        monitor = watching(self.run_id, tracking_uri=self._client.tracking_uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested sections get dotted names."""
        from mlflow.entities import Param

        rows = [Param(key, str(value)) for key, value in _flat(values)]
        for start in range(0, len(rows), 100):
            self.attempt(self._client.log_batch, self.run_id, params=rows[start : start + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.attempt(self._client.log_batch, self.run_id, tags=[RunTag(k, v) for k, v in values.items()])

    def inputs(self, hashes: Mapping[str, str]) -> None:
        """Record the data that was read, by path and DVC hash."""
        from mlflow.entities import Dataset, DatasetInput

        rows = [DatasetInput(Dataset(path, key[:36], "dvc", path)) for path, key in hashes.items()]
        self.attempt(self._client.log_inputs, self.run_id, datasets=rows)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add one point to the curve of every name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer.extend(Metric(name, float(value), now, step) for name, value in values.items())
        if len(self._buffer) >= self._FLUSH_AT or time.monotonic() - self._flushed_at > self._FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        rows, self._buffer = self._buffer, []
        self._flushed_at = time.monotonic()
        for start in range(0, len(rows), 1000):
            self.attempt(self._client.log_batch, self.run_id, metrics=rows[start : start + 1000])

    def figure(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure."""
        self.attempt(self._client.log_figure, self.run_id, figure, name)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows as a table that MLflow's page shows."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = {column: [row.get(column) for row in rows] for column in columns}
        self.attempt(self._client.log_table, self.run_id, data, name)

    def dict(self, value: Mapping[str, Any], name: str) -> None:
        """Store a JSON file."""
        self.attempt(self._client.log_dict, self.run_id, {**value}, name)

    def file(self, path: Path) -> None:
        """Store a copy of a file under its own name."""
        self.attempt(self._client.log_artifact, self.run_id, str(path))

    def finish(self, status: str) -> None:
        """End the run (FINISHED, FAILED, KILLED), and the parent too when nothing else will."""
        self.flush()
        self.attempt(self._client.set_terminated, self.run_id, status)
        if self._parent.owned:
            self.attempt(self._client.set_terminated, self.parent_id, status)

    def attempt(self, send: Callable[..., object], *arguments: object, **named: object) -> None:
        """Send something; the first failure is told once and ends the recording, not the work."""
        if self._broken:
            return
        try:
            send(*arguments, **named)
        except Exception as error:
            self._broken = True
            reason = " ".join(str(error).split())[:300]
            print(f"warning: the run is no longer recorded, work goes on: {reason}", file=sys.stderr)


def _experiment(client: Any, name: str, uri: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    # A server decides for itself where artifacts go.
    location = (workspace() / "mlruns" / "artifacts").as_uri() if uri.startswith("sqlite:") else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:
        # Another process, maybe of another machine, has just made it.
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
        return str(known.experiment_id)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """MLflow creates its tables without a lock: processes that start together would break a new database."""
    folder = workspace() / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _dvc_process() -> str | None:
    """Key of the ``dvc`` process above this one: all the stages that it starts belong to one execution."""
    if "DVC_STAGE" not in os.environ:
        return None
    import psutil

    for process in psutil.Process().parents():
        try:
            names = [Path(word).name for word in process.cmdline()[:3]]
            started = process.create_time()
        except psutil.Error:
            return None
        if "dvc" in names:
            return f"{socket.gethostname()}-{process.pid}-{started:.2f}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
