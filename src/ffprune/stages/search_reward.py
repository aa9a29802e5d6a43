"""The reward of the stages search and transfer, from the project's files.

It stands apart from the search, whose libraries a worker does without: every worker calls this for itself.
"""

from __future__ import annotations

from ffprune.compress.structured import prepare
from ffprune.evaluate.reward import ModelReward
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, dense_view, read_orders, validation_windows
from ffprune.stages.levels import read_levels
from ffprune.stages.record import ORDER
from ffprune.stages.reward import trial_reward


def search_reward(ctx: StageContext) -> ModelReward:
    """Scores policies by the dense model, cut and, where the parameters say so, repaired by the bank of levels.

    Raises:
        TooLittleText: the validation text has not the windows that trials and comparison take.
    """
    params, compute = ctx.params.search, ctx.params.compute
    windows = validation_windows(ctx, params.seqlen, "search.seqlen")
    view = dense_view(ctx, DTYPES["float32"])
    orders = read_orders(view, ctx.path(ORDER), params.compensated)
    damping = ctx.params.levels.damping
    levels = read_levels(view, orders, ctx.path, damping, params.step) if params.compensated else None
    plan = prepare(view, orders, levels, DTYPES[compute.dtype])
    return trial_reward(plan, view.units, windows, params.reward, params, ctx.params.seed)
