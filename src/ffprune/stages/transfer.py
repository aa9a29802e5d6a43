"""transfer: the trained agent continues at the next sparsity with a fraction of the episodes."""

from __future__ import annotations

from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.record import SEARCH_AGENT, TRANSFER_AGENT, TRANSFER_EPISODES, TRANSFER_POLICY
from ffprune.stages.search import Task, run_search, write_result


def run(ctx: StageContext) -> None:
    """Policy transfer (FF 2.2, SS Table 6): networks and optimiser go on from the first search."""
    params = ctx.params.transfer
    trained = artifacts.read_tensors(ctx.path(SEARCH_AGENT))
    found = run_search(ctx, Task(params.sparsity, params.episodes, params.schedule, trained))
    write_result(ctx, *found, params.sparsity, TRANSFER_POLICY, TRANSFER_AGENT, TRANSFER_EPISODES)
