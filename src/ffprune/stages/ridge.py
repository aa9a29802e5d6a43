"""ridge: the same policies, cut by the criterion that knows the repair, and repaired by ridge regression."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from ffprune.compress.experts import check_experts
from ffprune.compress.follow import follow
from ffprune.core.ridge import repair
from ffprune.core.units import Allocation
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import light_copy, read_unit, set_unit, slice_model
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, calibration_windows, dense_view, kept_granules, read_grams, read_orders
from ffprune.stages.policies import read_policy
from ffprune.stages.progress import Progress
from ffprune.stages.record import DENSE, GRAMS, ORDER, PRUNED, REPAIRED


def run(ctx: StageContext) -> None:
    """For models of the prune stage their repaired twins ``SPARSITY/POLICY+REPAIR`` (``ridge.repairs``).

    A twin keeps as many granules of every unit, but those that the repair can do least without: a cut that is left as
    it is and a cut that is repaired want different granules kept.
    """
    params = ctx.params.ridge
    dense = dense_view(ctx, DTYPES["float32"])
    for name, policies in params.repairs.items():
        if policies:
            check_experts(dense, "ridge.repairs", "slice", name)
    orders = read_orders(dense, ctx.path(ORDER), repaired=True)
    tokenizer = load_tokenizer(ctx.path(DENSE))
    storage = stored_dtype(ctx.path(DENSE))
    targets = sorted(path for path in ctx.path(PRUNED).iterdir() if path.is_dir())
    wanted = {
        name: [(target, policy) for target in targets for policy in policies]
        for name, policies in params.repairs.items()
        if policies
    }
    cuts = [target / policy for pairs in wanted.values() for target, policy in pairs]
    artifacts.check_room(ctx.path(REPAIRED), sum(file.stat().st_size for cut in cuts for file in cut.iterdir()))
    makers = {"ridge": _own_output, "stream": _stream}
    # What a repair reads is read once, for all policies, and only if one asks for it.
    repairs = {name: makers[name](ctx, dense, orders) for name in wanted}
    with artifacts.atomic_dir(ctx.path(REPAIRED)) as out:
        for name, pairs in wanted.items():
            # A bar for every repair: one takes many times as long as another.
            with ctx.progress(len(pairs) * len(dense.units), f"repair {name}, units") as bar:
                for target, policy in pairs:
                    facts = target / f"{policy}.json"
                    method = f"{policy}+{name}"

                    def done(units: int, bar: Progress = bar, shown: str = f"{target.name}/{method}") -> None:
                        bar.update(units, model=shown)

                    model = repairs[name](read_policy(facts)[0], done)
                    save_model(model, tokenizer, out / target.name / method, storage)
                    shutil.copyfile(facts, out / target.name / f"{method}.json")


Repair = Callable[[Allocation, Callable[[int], None]], PreTrainedModel]
"""(policy, told of units done) -> the repaired model, a copy."""


def _own_output(ctx: StageContext, dense: ModelView, orders: list[Tensor]) -> Repair:
    """The papers' repair: every unit gives back its own output on dense inputs (FF Eq. 6-7, METHODS 7)."""
    params = ctx.params.ridge
    grams = read_grams(dense, ctx.path(GRAMS))

    def make(policy: Allocation, done: Callable[[int], None]) -> PreTrainedModel:
        kept = kept_granules(orders, policy)
        model = light_copy(dense.model)
        view = ModelView(model, dense.heads)
        slice_model(view, kept)
        for index, granules in enumerate(kept):
            parts = dense.unit_linears(index)
            if len(granules) < parts.granules:
                weight = parts.last.weight.detach().cpu().float()
                repaired = repair(weight, grams[index], parts.columns(granules), params.damping, params.absolute)
                set_unit(view, index, read_unit(view, index).replace_last(repaired.to(parts.last.weight.device)))
            done(1)
        return model

    return make


def _stream(ctx: StageContext, dense: ModelView, orders: list[Tensor]) -> Repair:
    """Every unit is repaired towards the dense model's residual stream, behind what was cut before it."""
    params = ctx.params.ridge.stream
    windows = calibration_windows(ctx, params.seqlen, params.windows, "ridge.stream.windows")

    def make(policy: Allocation, done: Callable[[int], None]) -> PreTrainedModel:
        view = ModelView(light_copy(dense.model), dense.heads)
        follow(
            view,
            policy,
            windows,
            params.batch_size,
            orders,
            ctx.params.ridge.damping,
            DTYPES[ctx.params.compute.dtype],
            lambda layer, layers: done(len(view.units) // layers),
        )
        return view.model

    return make
