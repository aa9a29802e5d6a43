"""prune: cut the policies out of the dense model, as physically smaller tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffprune.core.units import Allocation
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import light_copy, slice_model
from ffprune.models.view import ModelView
from ffprune.stages import artifacts
from ffprune.stages.budget import MADE, Budget
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import kept_granules, read_orders
from ffprune.stages.policies import read_policy
from ffprune.stages.record import DENSE, ORDER, POLICIES, PRUNED, SEARCH_POLICY, TRANSFER_POLICY


def run(ctx: StageContext) -> None:
    """One folder per sparsity and policy, ``SPARSITY/POLICY``; the policy stands beside it."""
    # Nothing is computed: weights that no cut replaces stay mapped in their file.
    dense = load_model(ctx.path(DENSE), stored_dtype(ctx.path(DENSE)), finite=False)
    tokenizer = load_tokenizer(ctx.path(DENSE))
    view = ModelView(dense, ctx.params.units.heads)
    orders = read_orders(view, ctx.path(ORDER), repaired=False)
    cuts = _cuts(ctx, view)
    artifacts.check_room(ctx.path(PRUNED), len(cuts) * sum(parameter.nbytes for parameter in dense.parameters()))
    with artifacts.atomic_dir(ctx.path(PRUNED)) as folder, ctx.progress(len(cuts), "prune") as bar:
        for target, name, allocation, budget in cuts:
            model = light_copy(dense)
            slice_model(ModelView(model, view.heads), kept_granules(orders, allocation))
            _write(model, tokenizer, folder / f"{target:g}" / name, target, allocation, budget)
            bar.update(1, policy=f"{target:g}/{name}")
    # Apart from the models: who only looks at policies need not fetch these.
    artifacts.write_json(
        ctx.path(POLICIES),
        [{"sparsity_target": target, "policy": name, "units": cut.to_rows()} for target, name, cut, _ in cuts],
    )
    ctx.log_table(
        "cuts.json",
        [{"sparsity_target": target, "policy": name, "sparsity": cut.sparsity} for target, name, cut, _ in cuts],
    )


def _cuts(ctx: StageContext, view: ModelView) -> list[tuple[float, str, Allocation, Budget]]:
    """Every policy asked for, at both sparsities; those that are made here, on the budget of the searched one."""
    params = ctx.params.prune
    bounds = params.bounds()
    cuts: list[tuple[float, str, Allocation, Budget]] = []
    for path in (SEARCH_POLICY, TRANSFER_POLICY):
        found, facts = read_policy(ctx.path(path))
        target, budget = float(facts["sparsity_target"]), Budget.on(view, facts["budget"])
        makers: dict[str, Callable[[], Allocation]] = {
            name: partial(make, budget.units, target, bounds) for name, make in MADE.items()
        }
        makers["searched"] = partial(Allocation, found.units, found.kept)
        cuts += [(target, name, makers[name](), budget) for name in params.policies]
    return cuts


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    target: float,
    allocation: Allocation,
    budget: Budget,
) -> None:
    save_model(model, tokenizer, folder)
    artifacts.write_json(
        folder.with_name(f"{folder.name}.json"),
        {
            "method": folder.name,
            "granularity": "structured",
            "budget": budget.facts["name"],
            "sparsity_target": target,
            "sparsity": allocation.sparsity,
            "removed": budget.removed(allocation),
            "units": allocation.to_rows(),
        },
    )
