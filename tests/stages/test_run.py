"""One stage through its function (a test's door) and through run_stage (DVC's door)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from ffprune.core.errors import MissingInput
from ffprune.stages.context import StageContext, UndeclaredPath
from ffprune.stages.params import load_params
from ffprune.stages.record import Stage
from ffprune.stages.run import call, run_stage
from ffprune.stages.tracking import open_store
from tests.toy import REPO, isolate

Body = Callable[[StageContext], None]
TOY = Stage("toy", "A toy.", params=("compute", "seed"), deps=("in.txt",), outs=("out.txt",))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Body], None]]:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch)
    shutil.copy(REPO / "params.yaml", tmp_path)
    Path("in.txt").write_text("in")

    def installer(body: Body) -> None:
        module = ModuleType("ffprune.stages.toy")
        module.run = body  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ffprune.stages.toy", module)

    yield installer


def context() -> StageContext:
    return StageContext(TOY, load_params())


def test_a_direct_call_needs_no_tracking(install: Callable[[Body], None]) -> None:
    def body(ctx: StageContext) -> None:
        ctx.log_curve("reward", [1.0, 2.0])
        with ctx.progress(1, "toy") as bar:
            bar.update()
        ctx.path("out.txt").write_text(ctx.path("in.txt").read_text())

    install(body)
    call(TOY, context())
    assert Path("out.txt").read_text() == "in"
    assert not Path("mlruns").exists()


def test_run_stage_records_the_run(install: Callable[[Body], None], with_database: Callable[[], None]) -> None:
    with_database()

    def body(ctx: StageContext) -> None:
        ctx.log_metrics({"reward": 0.5}, step=3)
        ctx.set_tags(method="searched")

    install(body)
    Path("above").mkdir()
    Path("above/over.txt").write_text("over")
    # As a study does, whose folder lies in the project.
    run_stage(replace(TOY, deps=(*TOY.deps, "above/../above/over.txt")))
    record = json.loads(Path(TOY.run_record).read_text())
    assert record["inputs"]["in.txt"] == "13b5bfe96f3e2fe411c9f66f4a582adf"
    assert {"finished", "version.torch", "processor", "threads"} <= set(record)
    store = open_store(load_params().tracking)
    run = store.client.get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == record["parent_run_id"]
    assert run.data.tags["method"] == "searched"
    assert run.data.tags["input.in.txt"] == "13b5bfe96f3e2fe411c9f66f4a582adf"
    assert "input.above/above/over.txt" in run.data.tags
    assert "version.torch" in run.data.tags
    assert "compute.dtype" in run.data.params
    assert "seed" in run.data.params
    assert {"reward", "seconds"} <= set(run.data.metrics)
    assert 0.05 < run.data.metrics["peak_memory_gb"] < 100


def test_a_failed_stage_is_a_failed_run_and_writes_no_record(
    install: Callable[[Body], None], with_database: Callable[[], None]
) -> None:
    with_database()

    def body(ctx: StageContext) -> None:
        raise RuntimeError("no")

    install(body)
    with pytest.raises(RuntimeError):
        run_stage(TOY)
    assert not Path(TOY.run_record).exists()
    store = open_store(load_params().tracking)
    assert {run.info.status for run in store.client.search_runs([store.experiment_id])} == {"FAILED"}


def test_a_missing_input_stops_before_anything_is_recorded(install: Callable[[Body], None]) -> None:
    Path("in.txt").unlink()
    with pytest.raises(MissingInput):
        run_stage(TOY)
    assert not Path("mlruns").exists()


def test_an_undeclared_path_is_refused(install: Callable[[Body], None]) -> None:
    with pytest.raises(UndeclaredPath, match=r"other\.txt"):
        context().path("other.txt")
    assert context().path("in.txt/inside") == Path("in.txt/inside")


def test_a_templated_input_follows_the_parameter(install: Callable[[Body], None]) -> None:
    stage = Stage("toy", "A toy.", params=("tracking",), deps=("${tracking.experiment}",))
    params = load_params()
    assert StageContext(stage, params).deps == (params.tracking.experiment,)


def test_checkpoints_belong_to_one_computation_and_go_after_success(install: Callable[[Body], None]) -> None:
    def body(ctx: StageContext) -> None:
        (ctx.checkpoint_dir / "step").write_text("1")

    first = context().checkpoint_dir
    assert context().checkpoint_dir == first
    Path("in.txt").write_text("other")
    assert context().checkpoint_dir != first
    install(body)
    call(TOY, context())
    assert not first.parent.exists()
