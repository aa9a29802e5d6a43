"""Running one stage: check everything, call its function, record the run."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.environment import keep_memory
from ffprune.stages.execution import close_dvc_execution, model_named
from ffprune.stages.integrity import check_code, check_inputs
from ffprune.stages.lineage import git_state, input_hashes, library_versions, machine, repository
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.record import PIPELINE_MODEL, STAGES, Stage, dense_model, facts_of
from ffprune.stages.registering import register_if_any
from ffprune.stages.sections import Compute, Params
from ffprune.stages.tracking import StageRun, find_parent, open_store, workspace


def run_stage(stage: Stage, params_file: Path = PARAMS_FILE) -> None:
    """Run a stage in the current folder, tracked.

    Raises:
        FfpruneError: a refusal, before work starts where that can be known.
    """
    params = load_params(params_file)
    deps = StageContext(stage, params).deps
    for dep in deps:
        artifacts.require(Path(dep))
    # By hand (`ffprune STAGE`), the stages before may have run without DVC: dvc.lock need not know their outputs.
    if "DVC_STAGE" in os.environ:
        check_code(repository(Path.cwd()))
        check_inputs(deps)
    store = open_store(params.tracking)
    parent = find_parent(store)
    run = StageRun(store, parent, stage.name)
    context = StageContext(stage, params, run)
    status, started = "FAILED", time.monotonic()
    try:
        hashes = input_hashes(context.deps)
        run.params({**context.param_values, "seed": params.seed})
        run.inputs(hashes)
        # A study reads from the folder above its own, and MLflow takes no name with dots that lead upwards.
        read = {f"input.{path.replace('../', '')}": key for path, key in hashes.items()}
        touched = {*context.deps, *stage.outs}
        model = next((name for name in params.models if dense_model(name) in touched), PIPELINE_MODEL)
        run.tags({**library_versions(), **read, **model_named(Path(facts_of(model)))})
        if "compute" in stage.params:
            configure(params.compute)
        with run.watched():
            call(stage, context)
        run.metrics({"seconds": time.monotonic() - started, **peak_memory()})
        _write_run_record(stage, run, params, hashes)
        status = "FINISHED"
        if stage == STAGES[-1]:
            run.attempt(register_if_any, store)
        if parent.owned:
            run.attempt(close_dvc_execution, store, parent.run_id, stage)
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def call(stage: Stage, context: StageContext) -> None:
    """Call the stage's function; its checkpoints go when it succeeds, those of other fingerprints too."""
    module, _, name = stage.function.partition(":")
    getattr(importlib.import_module(module), name)(context)
    shutil.rmtree(Path(".ckpt") / stage.name, ignore_errors=True)


def configure(compute: Compute) -> None:
    """Set what holds for a process: its memory, torch's threads and the precision of matrix products."""
    import torch

    keep_memory()
    if compute.threads:
        torch.set_num_threads(compute.threads)
    torch.set_float32_matmul_precision(compute.matmul_precision)


def peak_memory() -> dict[str, float]:
    """The most memory this process has held so far, in GB (10^9 bytes): of the host, and of GPUs if it used any."""
    import torch

    # Linux counts in KiB. Mapped files count as far as their pages were read.
    peaks = {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch gives it no types
        devices = range(torch.cuda.device_count())
        peaks["peak_gpu_memory_gb"] = sum(torch.cuda.max_memory_allocated(device) for device in devices) / 1e9
    return peaks


def _write_run_record(stage: Stage, run: StageRun, params: Params, hashes: Mapping[str, str]) -> None:
    artifacts.write_json(
        Path(stage.run_record),
        {
            "stage": stage.name,
            "run_id": run.run_id,
            "parent_run_id": run.parent_id,
            "experiment": params.tracking.experiment,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **git_state(workspace()),
            **library_versions(),
            **(machine(params.compute.device) if "compute" in stage.params else {}),
            "inputs": dict(hashes),
        },
    )
