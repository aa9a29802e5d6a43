"""The pipeline as a Prefect flow: one task per stage of dvc.yaml, which alone holds the graph.

DVC decides what is stale, Prefect schedules and shows, MLflow remembers. Prefect caches nothing: two caches
would disagree. States say what happened: Cached (nothing changed), Restored (the same inputs ran before, and
DVC's cache has the outputs), Completed (ran), Failed (with the stage's own message).
"""

from __future__ import annotations

import atexit
import sys
from collections import Counter
from contextlib import chdir
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import allow_failure, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field
from run_page import Bars, show_outcomes, show_results

from ffprune.core.errors import FfpruneError, MissingInput
from ffprune.stages.devices import Slots, slots_of
from ffprune.stages.editing import set_parameters
from ffprune.stages.environment import share_of_threads
from ffprune.stages.exclusive import only_run
from ffprune.stages.execution import SETTLED, Outcome, summarise_execution
from ffprune.stages.graph import Plan, read_plan
from ffprune.stages.lanes import Lanes, room
from ffprune.stages.lifeline import hasten_exit, leave_on_sigterm
from ffprune.stages.params import load_params
from ffprune.stages.progress import on_terminal
from ffprune.stages.record import METHOD, computes, fetches
from ffprune.stages.registering import register_if_any
from ffprune.stages.reproduce import Output, Processes, reproduce
from ffprune.stages.sections import Params
from ffprune.stages.tracking import PARENT_VARIABLE, Store, open_store, start_parent, store_uri

STATES: dict[Outcome, str] = {"cached": "Cached", "restored": "Restored", "ran": "Completed"}
# Only what is likely to pass is tried again (exit_status.py): a network, a lock, lost workers.
RETRY_AFTER_SECONDS = (5.0, 30.0)


@dataclass
class Execution:
    """One run of the flow: what it may start at once, what became of every stage."""

    root: Path
    plan: Plan
    parent: str
    force: bool
    lanes: Lanes
    gpus: Slots
    # A model that is fetched is in memory as a whole.
    fetching: Lanes = field(default_factory=lambda: Lanes(1, lambda: 1))
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)
    bars: Bars = field(default_factory=Bars)
    attempts: Counter[str] = field(default_factory=Counter)

    def settle(self, name: str) -> State[Any]:
        """Bring one stage up to date; the stages it waits for are settled."""
        unchanged = all(self.outcomes[up] == "cached" for up in self.plan.upstream[name])
        if unchanged and name not in self.plan.stale and not self.force:
            self.outcomes[name] = "cached"
        else:
            if self.attempts[name]:
                # Not Prefect's own delay: that sleeps on behind a Ctrl-C.
                self.processes.stopped.wait(RETRY_AFTER_SECONDS[self.attempts[name] - 1])
            self.attempts[name] += 1
            gpus = self.gpus if computes(name) else Slots([])
            # Not the task runner's size: stages that are known to be unchanged need no lane. All others wait until the
            # models are there, since how many lanes there are may depend on them.
            lanes = self.fetching if fetches(name) else self.lanes
            # The GPU first: who waits for one must not keep a lane that a stage without GPU could have.
            with gpus.taken() as device, lanes.taken() as count:
                # With several stages at once their bars would overwrite each other.
                terminal = on_terminal() and count == 1
                done = reproduce(
                    name,
                    self.root,
                    Output(_to_terminal if terminal else _nowhere, partial(self._log, name, terminal)),
                    self.processes,
                    force=self.force,
                    terminal=terminal,
                    variables={PARENT_VARIABLE: self.parent, **share_of_threads(count), **device},
                )
            self.outcomes[name] = done.outcome
            if done.outcome == "failed":
                self.messages[name] = done.message
                return Failed(message=done.message, data=done.transient)
            if done.outcome not in STATES:
                return Cancelled(message=done.message)
            self.messages.pop(name, None)  # of an attempt before
        title = STATES[self.outcomes[name]]
        print(f"{name}: {title}", flush=True)
        return Completed(name=title, message=f"{name}: {title}", data=self.outcomes[name])

    def settled(self) -> set[str]:
        """Stages that are up to date."""
        return {name for name, outcome in self.outcomes.items() if outcome in SETTLED}

    def _log(self, name: str, terminal: bool, line: str) -> None:
        get_run_logger().info(line)
        self.bars.show(name, line)
        if not terminal:
            print(f"[{name}] {line}", flush=True)


def _to_terminal(chunk: bytes) -> None:
    sys.stderr.buffer.write(chunk)
    sys.stderr.flush()


def _nowhere(chunk: bytes) -> None:
    pass


@flow(name="prune-pipeline", task_runner=ThreadPoolTaskRunner(max_workers=32), persist_result=False)  # type: ignore[arg-type]
def pipeline(
    stages: list[str] | None = None,
    force: bool = False,
    workers: Annotated[int, Field(ge=0)] = 1,
    folder: str = ".",
    params: dict[str, Any] | None = None,
) -> State[Any]:
    """Bring the pipeline up to date.

    Args:
        stages: only these and what they need; everything when empty.
        force: run even what did not change.
        workers: stages that may run at the same time (they share this machine's cores); 0: as many as have room.
        folder: where the pipeline is: the project, or a study in it (studies/MODEL).
        params: parameters to change in its params.yaml first, by name, such as {"search.sparsity": 0.3}; they stay.
    """
    try:
        if not (Path(folder) / "dvc.yaml").is_file():
            raise MissingInput(
                f"the pipeline in {Path(folder).absolute()} was to run",
                "there is no dvc.yaml; the project's folder has one, and every study in studies/",
                "change the parameter folder",
            )
        with chdir(folder), only_run(Path.cwd()):
            for line in set_parameters(params or {}):
                print(line, flush=True)
            return _run(stages or [], force, workers)
    except FfpruneError as refusal:
        return Failed(message=str(refusal))


def _run(stages: list[str], force: bool, workers: int) -> State[Any]:
    root, params = Path.cwd(), load_params()
    slots = slots_of(params.compute, params.workers)
    lanes = Lanes(workers, partial(room, root, params, slots))
    plan = read_plan(root, stages)
    store = open_store(params.tracking)
    execution = Execution(root, plan, start_parent(store, "ffprune run"), force, lanes, Slots(slots))
    status = "FAILED"

    @task(cache_policy=NO_CACHE, persist_result=False)
    def stage(name: str, upstream: list[Outcome]) -> State[Any]:
        return execution.settle(name)

    try:
        futures: dict[str, Any] = {}
        first = [name for name in plan.upstream if fetches(name)]
        for name in [*first, *(name for name in plan.upstream if name not in first)]:
            ready = [futures[up] for up in plan.upstream[name]]
            named = stage.with_options(name=name, retries=len(RETRY_AFTER_SECONDS), retry_condition_fn=_may_pass)
            # A model that could not be fetched stops those stages alone that read it.
            models = [] if name in first else [allow_failure(futures[model]) for model in first]
            submit: Any = named.submit  # its declaration has a task's own parameters alone
            futures[name] = submit(name, ready, wait_for=models)
        for name, future in futures.items():
            future.wait()
            # A stage that raised where no stage should: its state alone knows why.
            if future.state.is_failed() or future.state.is_crashed():
                execution.messages.setdefault(name, str(future.state.message))
        if all(future.state.is_completed() for future in futures.values()):
            status = "FINISHED"
    except BaseException:
        status = "KILLED"
        execution.processes.end()
        raise
    finally:
        _record(execution, store, status, params)
    if status == "FINISHED":
        return Completed(message=_counts(execution))
    return Failed(message="; ".join(f"stage '{n}' failed: {m}" for n, m in execution.messages.items()))


def _may_pass(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a failed stage is worth another attempt; an exception (no stage's doing) is not."""
    return state.data is True


def _record(execution: Execution, store: Store, status: str, params: Params) -> None:
    """The outcome of every stage on the MLflow parent run; on Prefect's page when the flow was not killed."""
    outcomes: dict[str, Outcome] = {n: execution.outcomes.get(n, "not run") for n in execution.plan.upstream}
    rows = summarise_execution(store, execution.parent, outcomes)
    store.client.set_terminated(execution.parent, status)
    if status != "KILLED":
        if any(outcome == "ran" and name.startswith(f"{METHOD.name}@") for name, outcome in outcomes.items()):
            try:  # the stage report does it for the pipeline's own models
                register_if_any(store)
            except Exception as error:  # what has run stays run, registered or not
                print(f"not registered: {error}", file=sys.stderr)
        show_outcomes(rows, store_uri(params.tracking), store.experiment_id, execution.parent)
        show_results(execution.settled())


def _counts(execution: Execution) -> str:
    found = list(execution.outcomes.values())
    return ", ".join(f"{found.count(outcome)} {outcome}" for outcome in STATES)


def main(stages: Annotated[list[str] | None, typer.Argument()] = None, force: bool = False, workers: int = 1) -> None:
    """Run the flow; status 1 when a stage failed."""
    tell(pipeline(stages or [], force, workers, return_state=True))


def tell(state: State[Any]) -> None:
    """Say how a flow ended; status 1 when it failed."""
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        sys.exit(1)
    print(state.message)


if __name__ == "__main__":
    atexit.register(hasten_exit)
    leave_on_sigterm()
    typer.run(main)
