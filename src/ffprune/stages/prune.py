"""prune: cut the policies out of the dense model, as physically smaller tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ffprune.allocate.uniform import handmade, uniform
from ffprune.core.policy import Bounds
from ffprune.core.units import Allocation
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import copy_model, slice_model
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import load, read_orders, read_policy
from ffprune.stages.record import DENSE, ORDER, PRUNED, SEARCH_POLICY, TRANSFER_POLICY


def run(ctx: StageContext) -> None:
    """One folder per sparsity and policy, ``SPARSITY/POLICY``; kept granules and policy stand beside it."""
    params = ctx.params.prune
    dense = load(ctx.path(DENSE), ctx.params.compute, stored_dtype(ctx.path(DENSE)))
    tokenizer = load_tokenizer(ctx.path(DENSE))
    view = ModelView(dense)
    orders = read_orders(view, ctx.path(ORDER))
    searched = [read_policy(ctx.path(path)) for path in (SEARCH_POLICY, TRANSFER_POLICY)]
    bounds = Bounds(params.min_keep, 1.0)
    cuts: list[tuple[float, str, Allocation]] = []
    for allocation, facts in searched:
        target = float(facts["sparsity_target"])
        makers: dict[str, Callable[[], Allocation]] = {
            "uniform": partial(uniform, view.units, target, bounds),
            "handmade": partial(handmade, view.units, target, bounds),
            "searched": partial(_as_found, allocation),
        }
        cuts += [(target, name, makers[name]()) for name in params.policies]
    size = sum(parameter.nbytes for parameter in dense.parameters())
    artifacts.check_room(ctx.path(PRUNED), size * len(cuts))
    rows = []
    with artifacts.atomic_dir(ctx.path(PRUNED)) as folder, ctx.progress(len(cuts), "prune") as bar:
        for target, name, allocation in cuts:
            kept = kept_granules(orders, allocation)
            model = copy_model(dense)
            slice_model(ModelView(model), kept)
            place = folder / f"{target:g}"
            save_model(model, tokenizer, place / name)
            artifacts.write_tensors(
                place / f"{name}.kept.safetensors",
                {unit.name: indices for unit, indices in zip(view.units, kept, strict=True)},
            )
            artifacts.write_json(
                place / f"{name}.json",
                {
                    "method": name,
                    "granularity": "structured",
                    "sparsity_target": target,
                    "sparsity": allocation.sparsity,
                    "units": allocation.to_rows(),
                },
            )
            rows.append({"sparsity_target": target, "policy": name, "sparsity": allocation.sparsity})
            bar.update(1, policy=f"{target:g}/{name}")
    ctx.log_table("cuts.json", rows)


def _as_found(allocation: Allocation) -> Allocation:
    return allocation


def kept_granules(orders: Sequence[Tensor], allocation: Allocation) -> list[Tensor]:
    """Per unit, the granules that stay, in their original order, int64 ``[kept]``."""
    return [torch.sort(order[:kept]).values for order, kept in zip(orders, allocation.kept, strict=True)]
