"""What one pipeline execution did with every stage, as a table and tags on the parent run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ffprune.stages.artifacts import read_json
from ffprune.stages.record import DOWNLOADED, STAGES, SUMMARY, Stage
from ffprune.stages.table import best_rows
from ffprune.stages.tracking import Store

Outcome = Literal["ran", "restored", "cached", "failed", "stopped", "not run"]
SETTLED: tuple[Outcome, ...] = ("ran", "restored", "cached")
"""The stage's outputs are there and are those of its inputs."""


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
    for name, text in model_named(Path(DOWNLOADED)).items():
        store.client.set_tag(parent_id, name, text)
    if outcomes.get("report") in SETTLED and Path(SUMMARY).is_file():
        _measured(store, parent_id, read_json(Path(SUMMARY))["rows"])
    return rows


def _measured(store: Store, parent_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was measured, to find executions by: the tag ``methods`` and a metric of every method's perplexity.

    A metric is named as the stage evaluate names its own; MLflow allows no '+' there.
    """
    store.client.set_tag(parent_id, "methods", ", ".join(dict.fromkeys(row["method"] for row in rows)))
    for row in rows:
        if row["perplexity"] is not None:
            name = f"{row['method']} {row['sparsity_target']:g}".replace("+", " and ")
            store.client.log_metric(parent_id, f"perplexity/{name}", row["perplexity"])
    for name, value in _best_ratios(rows).items():
        store.client.log_metric(parent_id, name, value)


def model_named(facts: Path) -> dict[str, str]:
    """The tag ``model``, as the stage that fetched the model knows it; none before."""
    return {"model": str(read_json(facts)["model"]["name"])} if facts.is_file() else {}


def _best_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The lowest perplexity over the dense model's at every target: columns to compare executions by."""
    return {
        f"best_ratio/{row['sparsity_target']:g}": row["perplexity"] / row["dense_perplexity"] for row in best_rows(rows)
    }


def stage_row(name: str, outcome: Outcome) -> dict[str, Any]:
    """Stage, outcome, id of the run that made its outputs, and when that run finished."""
    record = Path("metrics/runs") / f"{name}.json"
    made: dict[str, Any] = read_json(record) if outcome in SETTLED and record.is_file() else {}
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
