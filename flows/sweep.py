"""A sweep as a Prefect flow: the pipeline of one study after the other, then one table of them all."""

from __future__ import annotations

import atexit
from typing import Annotated, Any

import typer
from pipeline import pipeline, tell
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field
from run_page import attempt

from ffprune.core.errors import FfpruneError
from ffprune.stages.exhibits.sweeping import Granularity
from ffprune.stages.lifeline import hasten_exit, leave_on_sigterm
from ffprune.stages.sweep import PAGE, prepare, publish_table

Share = Annotated[float, Field(gt=0, lt=1)]


@flow(name="prune-sweep", persist_result=False)
def sweep(
    models: list[str] | None = None,
    granularities: list[Granularity] | None = None,
    sparsities: list[Share] | None = None,
    methods: list[str] | None = None,
    full: bool = False,
    workers: Annotated[int, Field(ge=0)] = 0,
) -> State[Any]:
    """Measure methods on several models; `ffprune sweep --help` says more.

    Args:
        models: profiles; the one in params.yaml when empty.
        granularities: of structured, unstructured, 2:4 and 4:8; structured when empty.
        sparsities: removed / prunable; those of `ffprune compare` when empty.
        methods: of those that `ffprune compare` knows; its short list when empty.
        full: as many trials as the full variant of `ffprune compare`.
        workers: methods that may run at the same time; 0: as many as have room.
    """
    failed = []
    try:
        parts = prepare(models or [], granularities or ["structured"], sparsities or [], methods or [], full)
        for part in parts:
            named = pipeline.with_options(flow_run_name=f"{part.model} study")
            state = named(part.stages, workers=workers, folder=str(part.folder), return_state=True)
            # One model's failure is no reason not to measure the others.
            if not state.is_completed():
                failed.append(f"{part.model}: {state.message}")
        shown = publish_table(parts)
    except FfpruneError as refusal:
        return Failed(message=str(refusal))
    attempt(create_table_artifact, shown.rows, "sweep-numbers", str(PAGE.with_suffix(".csv")))
    attempt(create_markdown_artifact, shown.markdown, "sweep", str(PAGE))
    if failed:
        return Failed(message="; ".join(failed))
    return Completed(message=f"{sum(len(part.recipes) for part in parts)} methods")


def main(
    model: Annotated[list[str] | None, typer.Option()] = None,
    granularity: Annotated[list[str] | None, typer.Option()] = None,
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    method: Annotated[list[str] | None, typer.Option()] = None,
    full: bool = False,
    workers: int = 0,
) -> None:
    """Run the flow; status 1 when a stage failed."""
    tell(sweep(model, granularity, sparsity, method, full, workers, return_state=True))


if __name__ == "__main__":
    atexit.register(hasten_exit)
    leave_on_sigterm()
    typer.run(main)
