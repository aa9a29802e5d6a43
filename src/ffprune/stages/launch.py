"""``ffprune run``: the Prefect flow; when nothing is stale and no server is up, only the record of that fact.

Starting Prefect's temporary server takes longer than the rest of an unchanged run together, and would show
states that are known already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ffprune.core.errors import MissingInput
from ffprune.stages.environment import prepare_prefect
from ffprune.stages.execution import Outcome, summarise_execution
from ffprune.stages.graph import Plan, read_plan
from ffprune.stages.lineage import repository
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.tracking import open_store, start_parent

FLOW = Path("flows") / "pipeline.py"
SWEEP = Path("flows") / "sweep.py"


def launch(targets: Sequence[str], force: bool, workers: int) -> None:
    """Check the parameters, then run what is stale."""
    root, project = Path.cwd(), repository(Path.cwd())
    if not (project / FLOW).is_file() or not (root / "dvc.yaml").is_file():
        raise MissingInput(
            f"the pipeline was to run in {root}",
            f"it runs in the project's folder, the one with dvc.yaml and {FLOW}, or in a study inside it",
            "change to that folder",
        )
    load_params(PARAMS_FILE)
    if prepare_prefect(project) or force:
        _hand_over(project, targets, force, workers)
    plan = read_plan(root, targets)
    if plan.stale:
        _hand_over(project, targets, force, workers)
    record_unchanged(plan)


def record_unchanged(plan: Plan) -> None:
    """Show every stage as cached and give MLflow its run of this execution."""
    tracking = load_params(PARAMS_FILE).tracking
    store = open_store(tracking)
    parent = start_parent(store, "ffprune run")
    outcomes: dict[str, Outcome] = dict.fromkeys(plan.upstream, "cached")
    for row in summarise_execution(store, parent, outcomes):
        print(f"{row['stage']}: Cached (run {row['run_id']} of {row['finished']})")
    store.client.set_terminated(parent, "FINISHED")


def launch_sweep(words: Sequence[str]) -> NoReturn:
    """Start the flow of a sweep with these words of a command line; its studies are there and checked."""
    prepare_prefect(Path.cwd())
    _become([str(SWEEP), *words])


def _hand_over(project: Path, targets: Sequence[str], force: bool, workers: int) -> NoReturn:
    _become([str(project / FLOW), "--workers", str(workers), *(["--force"] if force else []), *targets])


def _become(words: Sequence[str]) -> NoReturn:
    # Replacing this process keeps signals and exit status simple: there is no one in between.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])
