"""The reward of a search: trials are set on the really pruned model and scored on validation text."""

from __future__ import annotations

import torch
from torch import Tensor

from ffprune.compress.structured import Plan
from ffprune.compress.unstructured import MaskPlan
from ffprune.core.units import Allocation, Unit
from ffprune.evaluate.reward import ModelReward
from ffprune.stages.sections import Trials


def trial_reward(
    plan: Plan | MaskPlan, units: tuple[Unit, ...], windows: Tensor, kind: str, trials: Trials, seed: int
) -> ModelReward:
    """Scores allocations by the model that a plan sets them on.

    Args:
        plan: sets allocations.
        units: what they are allocations of.
        windows: int64 ``[n, seqlen]``, validation text.
        kind: row of :data:`ffprune.evaluate.reward.REWARDS`.
        trials: what a trial and the final comparison cost.
        seed: of the draws.
    """
    return ModelReward(
        model=plan.view.model,
        apply=plan.apply,
        dense=Allocation.dense(units),
        windows=windows,
        kind=kind,
        trial_samples=trials.samples,
        fixed=trials.final_samples,
        batch_size=trials.batch_size,
        threads=trials.threads or torch.get_num_threads(),
        seed=seed,
    )
