"""What Prefect's page of a run shows: outcomes, policies, how far a search is, the results, the way to MLflow."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from ffprune.core.units import Allocation
from ffprune.stages.artifacts import read_json
from ffprune.stages.policies import read_policy
from ffprune.stages.progress import read_line
from ffprune.stages.record import PAGE, SEARCH_POLICY, SUMMARY, TRANSFER_POLICY
from ffprune.stages.table import markdown
from ffprune.stages.tracking import shown_uri

_POLICIES = {"search": SEARCH_POLICY, "transfer": TRANSFER_POLICY}


class Bars:
    """A progress artifact for every loop of every stage, moved by the plain lines that stages print."""

    def __init__(self) -> None:
        self._known: dict[str, UUID] = {}
        self._lock = threading.Lock()

    def show(self, stage: str, line: str) -> None:
        """Move the bar that a line of output tells of; other lines are none of its business."""
        step = read_line(line)
        if step is None or not step.total:
            return
        share, text = 100 * step.done / step.total, f"{step.what}: {step.done} of {step.total} {step.shown}".rstrip()
        key = slug(f"progress-{stage}")
        with self._lock:
            if key in self._known:
                attempt(update_progress_artifact, self._known[key], share, text)
            elif (made := attempt(create_progress_artifact, share, key, text)) is not None:
                self._known[key] = made


def show_outcomes(rows: Sequence[Mapping[str, Any]], store: str, experiment: str, run: str) -> None:
    """The table of stages and the links to the run and to the report in MLflow.

    Args:
        rows: of :func:`ffprune.stages.execution.summarise_execution`.
        store: MLflow's, as :func:`ffprune.stages.tracking.store_uri` names it.
        experiment: id of the experiment in it.
        run: id of the parent run.
    """
    # For people without a server as well.
    where = f"{shown_uri(store)} run {run}"
    attempt(create_table_artifact, list(rows), "stages", f"What became of every stage. MLflow: {where}")
    runs = f"{mlflow_page(store)}/#/experiments/{experiment}/runs"
    attempt(create_link_artifact, f"{runs}/{run}", key="mlflow-run")
    made = next((row["run_id"] for row in rows if row["stage"] == "report"), None)
    if made is not None:
        attempt(create_link_artifact, f"{runs}/{made}/artifacts/{Path(PAGE).name}", key="report", description=PAGE)


def mlflow_page(store: str) -> str:
    """Where MLflow's pages are: at the server that keeps the runs, else where one shows this machine's database."""
    if store.startswith(("http://", "https://")):
        # Whoever opens the link has a name of their own, or a browser that asks for it.
        return re.sub(r"(?<=://)[^/@]*@", "", store).rstrip("/")
    # `make` sets the variable whatever the store is, so it comes second.
    return os.environ.get("FFPRUNE_MLFLOW_URL", "http://127.0.0.1:5000").rstrip("/")


def show_results(settled: set[str]) -> None:
    """Policies as tables and one figure, and the report's table; of the stages that are up to date."""
    policies: dict[str, Allocation] = {}
    for stage, file in _POLICIES.items():
        if stage in settled:
            allocation, facts = read_policy(Path(file))
            target = f"{facts['sparsity_target']:g}"
            policies[f"sparsity {target}"] = allocation
            about = f"Sparsity {target}, found by {facts['source']}: how much of every unit stays"
            attempt(create_table_artifact, allocation.to_rows(), f"policy-{stage}", about)
    if policies:
        attempt(create_image_artifact, _drawn(policies), "policy", "Retention per layer, attention above FFN")
    if "report" in settled:
        attempt(create_markdown_artifact, markdown(read_json(Path(SUMMARY))), "results", SUMMARY)


def attempt(publish: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Publish something; None when Prefect cannot take it, which costs the page and not the work."""
    try:
        return publish(*arguments, **named)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"warning: Prefect's page lacks something: {type(error).__name__}: {reason}", file=sys.stderr)
        return None


def slug(name: str) -> str:
    """A name as keys of artifacts are spelt: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _drawn(policies: Mapping[str, Allocation]) -> str:
    """The figure inside its own address: the page needs no server that has the file."""
    from ffprune.stages import figures

    out = io.BytesIO()
    figures.policy(policies).savefig(out, format="png", dpi=80)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
