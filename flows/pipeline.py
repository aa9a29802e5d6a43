"""The pipeline as a Prefect flow: one task per stage of dvc.yaml, which alone holds the graph.

DVC decides what is stale, Prefect schedules and shows, MLflow remembers. Prefect caches nothing: two caches
would disagree. States say what happened: Cached (nothing changed), Restored (the same inputs ran before, and
DVC's cache has the outputs), Completed (ran), Failed (with the stage's own message).
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from ffprune.stages.artifacts import read_json
from ffprune.stages.environment import share_of_threads
from ffprune.stages.execution import Outcome, summarise_execution
from ffprune.stages.graph import Plan, read_plan
from ffprune.stages.params import load_params
from ffprune.stages.progress import on_terminal
from ffprune.stages.record import SUMMARY
from ffprune.stages.reproduce import Output, end_all, reproduce
from ffprune.stages.table import markdown
from ffprune.stages.tracking import PARENT_VARIABLE, Store, open_store, start_parent, store_uri

STATES: dict[Outcome, str] = {"cached": "Cached", "restored": "Restored", "ran": "Completed"}


@dataclass
class Execution:
    """One run of the flow: what it may start at once, what became of every stage."""

    root: Path
    plan: Plan
    parent: str
    force: bool
    workers: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A semaphore, not the task runner's size: stages that are known to be unchanged need no slot.
        self.slots = threading.BoundedSemaphore(self.workers)
        # With several stages at once their bars would overwrite each other.
        self.terminal = on_terminal() and self.workers == 1

    def settle(self, name: str) -> State[Any]:
        """Bring one stage up to date; the stages it waits for are settled."""
        unchanged = all(self.outcomes[up] == "cached" for up in self.plan.upstream[name])
        if unchanged and name not in self.plan.stale and not self.force:
            self.outcomes[name] = "cached"
        else:
            with self.slots:
                done = reproduce(
                    name,
                    self.root,
                    Output(self._echo, lambda line: self._log(name, line)),
                    force=self.force,
                    terminal=self.terminal,
                    variables={PARENT_VARIABLE: self.parent, **share_of_threads(self.workers)},
                )
            self.outcomes[name] = done.outcome
            if done.outcome == "failed":
                self.messages[name] = done.message
                return Failed(message=done.message)
        title = STATES[self.outcomes[name]]
        print(f"{name}: {title}", flush=True)
        return Completed(name=title, message=f"{name}: {title}", data=self.outcomes[name])

    def _echo(self, chunk: bytes) -> None:
        if self.terminal:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()

    def _log(self, name: str, line: str) -> None:
        get_run_logger().info(line)
        if not self.terminal:
            print(f"[{name}] {line}", flush=True)


@flow(name="prune-pipeline", task_runner=ThreadPoolTaskRunner(max_workers=32), persist_result=False)  # type: ignore[arg-type]
def pipeline(stages: list[str] | None = None, force: bool = False, workers: int = 1) -> State[Any]:
    """Bring the pipeline up to date in the current folder.

    Args:
        stages: only these and what they need; everything when empty.
        force: run even what did not change.
        workers: stages that may run at the same time (they share this machine's cores).
    """
    root = Path.cwd()
    tracking = load_params().tracking
    store = open_store(tracking)
    parent = start_parent(store, "ffprune run")
    status = "FAILED"
    execution = Execution(root, read_plan(root, stages or []), parent, force, workers)

    @task(cache_policy=NO_CACHE, persist_result=False)
    def stage(name: str, upstream: list[Outcome]) -> State[Any]:
        return execution.settle(name)

    try:
        futures: dict[str, Any] = {}
        for name, needed in execution.plan.upstream.items():
            ready = [futures[up] for up in needed]
            futures[name] = stage.with_options(name=name).submit(name, ready)
        for name, future in futures.items():
            future.wait()
            # A stage that raised where no stage should: its state alone knows why.
            if future.state.is_failed() or future.state.is_crashed():
                execution.messages.setdefault(name, str(future.state.message))
        if all(future.state.is_completed() for future in futures.values()):
            status = "FINISHED"
    except BaseException:
        status = "KILLED"
        end_all()
        raise
    finally:
        _record(execution, store, status, f"{store_uri(tracking)} run {parent}")
    if status == "FINISHED":
        return Completed(message=_counts(execution))
    return Failed(message="; ".join(f"stage '{n}' failed: {m}" for n, m in execution.messages.items()))


def _record(execution: Execution, store: Store, status: str, where: str) -> None:
    """The outcome of every stage on the MLflow parent run; on Prefect's page when the flow was not killed."""
    outcomes: dict[str, Outcome] = {n: execution.outcomes.get(n, "not run") for n in execution.plan.upstream}
    rows = summarise_execution(store, execution.parent, outcomes)
    store.client.set_terminated(execution.parent, status)
    if status == "KILLED":
        return
    create_table_artifact(rows, key="stages", description=f"What became of every stage. MLflow: {where}")
    page = os.environ.get("FFPRUNE_MLFLOW_URL", "http://127.0.0.1:5000")
    create_link_artifact(f"{page}/#/experiments/{store.experiment_id}/runs/{execution.parent}", key="mlflow-run")
    if execution.outcomes.get("report") in STATES:
        create_markdown_artifact(markdown(read_json(Path(SUMMARY))), key="results", description="metrics/summary.json")


def _counts(execution: Execution) -> str:
    found = list(execution.outcomes.values())
    return ", ".join(f"{found.count(outcome)} {outcome}" for outcome in STATES)


def main(stages: Annotated[list[str] | None, typer.Argument()] = None, force: bool = False, workers: int = 1) -> None:
    """Run the flow; status 1 when a stage failed."""
    state: State[Any] = pipeline(stages or [], force, workers, return_state=True)
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        sys.exit(1)
    print(state.message)


if __name__ == "__main__":
    typer.run(main)
