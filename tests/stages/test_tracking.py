"""In a database of the test's own: one parent, a child per stage that ran, cached stages pointing back."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from ffprune.stages import tracking
from ffprune.stages.artifacts import write_json
from ffprune.stages.execution import Outcome, close_dvc_execution, summarise_execution
from ffprune.stages.record import STAGES, stage_named
from ffprune.stages.sections import Tracking
from ffprune.stages.tracking import (
    Parent,
    StageRun,
    Store,
    TrackingBusy,
    TrackingUnavailable,
    open_store,
    reach_database,
    start_parent,
)
from tests.servers import free_ports
from tests.toy import isolate, wait_until

SETTINGS = Tracking(experiment="test", uri=None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_database: Callable[[], None]) -> Store:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    with_database()
    return open_store(SETTINGS)


def test_the_database_and_artifacts_stay_in_the_project(store: Store, tmp_path: Path) -> None:
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()
    run = store.client.get_run(start_parent(store, "x"))
    assert run.info.artifact_uri.startswith((tmp_path / "mlruns" / "artifacts").as_uri())
    assert open_store(SETTINGS).experiment_id == store.experiment_id


def test_a_stage_run_holds_everything(store: Store) -> None:
    parent = start_parent(store, "ffprune run")
    run = StageRun(store, Parent(parent, owned=False), "search")
    run.params({"search": {"episodes": 3}, "seed": 1})
    run.inputs({"models/dense": "0123456789abcdef.dir"})
    run.tags({"version.torch": "1"})
    for step in range(1000):
        run.metrics({"reward": step / 1000}, step)
    run.table("policy.json", [{"unit": "layers.0.ffn", "retention": 0.8}])
    run.dict({"a": 1}, "problem.json")
    run.finish("FINISHED")
    found = store.client.get_run(run.run_id)
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.data.params == {"search.episodes": "3", "seed": "1"}
    assert len(store.client.get_metric_history(run.run_id, "reward")) == 1000
    assert found.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef.dir"
    assert found.info.status == "FINISHED"
    assert {a.path for a in store.client.list_artifacts(run.run_id)} == {"policy.json", "problem.json"}
    assert store.client.get_run(parent).info.status == "RUNNING", "the flow ends its own run"


def test_a_parent_of_its_own_is_ended_with_the_stage(store: Store) -> None:
    parent = tracking.find_parent(store)
    StageRun(store, parent, "search").finish("FAILED")
    assert store.client.get_run(parent.run_id).info.status == "FAILED"


def test_the_flows_parent_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.PARENT_VARIABLE, "abc")
    assert tracking.find_parent(store) == Parent("abc", owned=False)


def test_stages_of_one_dvc_process_share_a_parent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_dvc_process", lambda: "host-1-2.00")
    first, second = tracking.find_parent(store), tracking.find_parent(store)
    assert first == second
    assert first.owned
    monkeypatch.setattr(tracking, "_dvc_process", lambda: "host-1-3.00")
    assert tracking.find_parent(store) != first


def test_the_dvc_process_is_found_from_inside_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch)
    assert tracking._dvc_process() is None
    look = "from ffprune.stages.tracking import _dvc_process; print(_dvc_process())"
    as_dvc = tmp_path / "dvc"
    as_dvc.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {look!r}])")
    monkeypatch.setenv("DVC_STAGE", "search")
    answer = subprocess.run([sys.executable, str(as_dvc)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() != "None"


def test_cached_stages_point_to_the_run_that_made_them(store: Store) -> None:
    write_json(Path("metrics/runs/download.json"), {"run_id": "old", "finished": "2026-01-01"})
    parent = start_parent(store, "ffprune run")
    summarise_execution(store, parent, {"download": "cached", "report": "failed"})
    run = store.client.get_run(parent)
    assert run.data.tags["stage.download"] == "cached"
    assert run.data.tags["stage.download.run_id"] == "old"
    assert run.data.tags["stage.report"] == "failed"
    assert "stage.report.run_id" not in run.data.tags
    file = store.client.download_artifacts(parent, "stages.json")
    assert json.loads(Path(file).read_text())["stages"][0] == {
        "stage": "download",
        "outcome": "cached",
        "run_id": "old",
        "finished": "2026-01-01",
    }


def test_executions_can_be_compared_by_model_and_best_ratio(store: Store) -> None:
    rows = [("a", 0.2, 15.0), ("b+stream", 0.2, 12.0), ("c", 0.3, None), ("d", 0.3, 18.0)]
    named = ("method", "sparsity_target", "perplexity")
    write_json(
        Path("metrics/summary.json"),
        {
            "rows": [
                {"budget": "parameters", "dense_perplexity": 10.0, **dict(zip(named, row, strict=True))} for row in rows
            ]
        },
    )
    write_json(Path("metrics/download.json"), {"model": {"name": "Small-1"}})
    measured = {"best_ratio/0.2": 1.2, "best_ratio/0.3": 1.8}
    measured |= {"perplexity/a 0.2": 15.0, "perplexity/b and stream 0.2": 12.0, "perplexity/d 0.3": 18.0}
    cases: dict[Outcome, dict[str, float]] = {"failed": {}, "cached": measured}
    for outcome, expected in cases.items():
        parent = start_parent(store, "ffprune run")
        summarise_execution(store, parent, {"report": outcome})
        run = store.client.get_run(parent)
        assert (run.data.metrics, run.data.tags["model"]) == (expected, "Small-1")
    # As docs/tracking.md asks for them.
    for query in ("tags.methods LIKE '%b+stream%'", "metrics.`perplexity/b and stream 0.2` < 12.5"):
        found = store.client.search_runs([store.experiment_id], filter_string=query)
        assert [one.info.run_id for one in found] == [parent]


def test_the_machine_is_watched_while_a_stage_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = StageRun(store, Parent(start_parent(store, "x"), owned=False), "search")
    with run.watched():
        assert wait_until(lambda: "system/system_memory_usage_megabytes" in metrics(store, run), 30)
    run.finish("FINISHED")
    assert metrics(store, run)["system/system_memory_usage_megabytes"] > 0


def metrics(store: Store, run: StageRun) -> dict[str, float]:
    found: dict[str, float] = store.client.get_run(run.run_id).data.metrics
    return found


def test_the_last_stage_of_dvc_repro_sums_up(store: Store) -> None:
    parent = start_parent(store, "dvc repro")
    StageRun(store, Parent(parent, owned=True), "evaluate").finish("FINISHED")
    close_dvc_execution(store, parent, stage_named("evaluate"))
    assert "stage.evaluate" not in store.client.get_run(parent).data.tags
    close_dvc_execution(store, parent, STAGES[-1])
    tags = store.client.get_run(parent).data.tags
    assert tags["stage.evaluate"] == "ran"
    assert tags["stage.search"] == "cached"


def test_an_unusable_address_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    with pytest.raises(TrackingUnavailable, match=r"set tracking\.uri"):
        open_store(Tracking(experiment="test", uri="nonsense://host"))


def test_a_database_that_is_not_there_is_refused_at_once_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    uri = f"postgresql://ada:secret@127.0.0.1:{free_ports(1)[0]}/runs"
    started = time.monotonic()
    with pytest.raises(TrackingUnavailable, match=r"postgresql://ada:\*\*\*@127.*refused") as caught:
        open_store(Tracking(experiment="test", uri=uri))
    # MLflow's own ten attempts take 100 seconds.
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "mlruns").exists()


def test_a_database_that_says_nothing_is_given_up() -> None:
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"),
    ):
        reach_database(f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/runs?sslmode=disable", 0.5)


def test_an_experiment_that_somebody_has_just_made_is_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Looked for, not found; made by another machine; then tried to make.
    answers = iter([None, store.client.get_experiment(store.experiment_id)])
    monkeypatch.setattr(store.client, "get_experiment_by_name", lambda name: next(answers))
    assert tracking._experiment(store.client, SETTINGS.experiment, "http://host") == store.experiment_id


@pytest.mark.slow
def test_a_locked_database_is_a_refusal_that_may_pass(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingBusy, match="database is locked"):
            open_store(SETTINGS)


def test_a_store_that_fails_later_costs_the_record_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = StageRun(store, Parent(start_parent(store, "x"), owned=True), "search")

    def lost(*arguments: object, **named: object) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(store.client, "log_batch", lost)
    for step in range(700):
        run.metrics({"reward": 1.0}, step)
    run.finish("FINISHED")
    assert capsys.readouterr().err.count("work goes on: connection lost") == 1


@pytest.mark.slow
def test_processes_that_start_together_do_not_break_a_new_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    code = (
        "from ffprune.stages.tracking import *; from ffprune.stages.sections import Tracking;"
        "print(open_store(Tracking(experiment='test', uri=None)).experiment_id)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    answers = {process.communicate()[0] for process in processes}
    assert len(answers) == 1
    assert all(process.returncode == 0 for process in processes)
