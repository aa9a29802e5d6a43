"""What one pipeline execution did with every stage, as a table and tags on the parent run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ffprune.stages.record import STAGES, Stage
from ffprune.stages.tracking import Store

Outcome = Literal["ran", "restored", "cached", "failed", "not run"]


def summarise_execution(store: Store, parent_id: str, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Write ``stages.json`` and the tags ``stage.NAME`` and ``stage.NAME.run_id`` on the parent run.

    A stage that did not run points to the run that made its outputs (a restored one brings that id along).
    """
    rows = [stage_row(name, outcome) for name, outcome in outcomes.items()]
    store.client.log_dict(parent_id, {"stages": rows}, "stages.json")
    for row in rows:
        tag = f"stage.{row['stage']}".replace("@", "/")  # MLflow allows no '@'
        store.client.set_tag(parent_id, tag, row["outcome"])
        if row["run_id"]:
            store.client.set_tag(parent_id, f"{tag}.run_id", row["run_id"])
    return rows


def stage_row(name: str, outcome: Outcome) -> dict[str, Any]:
    """Stage, outcome, id of the run that made its outputs, and when that run finished."""
    record = Path("metrics/runs") / f"{name}.json"
    settled = outcome in ("ran", "restored", "cached")
    made: dict[str, Any] = json.loads(record.read_text()) if settled and record.is_file() else {}
    return {
        "stage": name,
        "outcome": outcome,
        "run_id": made.get("run_id"),
        "finished": made.get("finished"),
    }


def close_dvc_execution(store: Store, parent_id: str, stage: Stage) -> None:
    """After the last stage of a plain ``dvc repro``: stages without a run under this parent were not run."""
    if stage != STAGES[-1]:
        return
    children = store.client.search_runs(
        [store.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent_id}'", max_results=1000
    )
    ran = {child.data.tags.get("ffprune.stage") for child in children}
    summarise_execution(store, parent_id, {s.name: "ran" if s.name in ran else "cached" for s in STAGES})
