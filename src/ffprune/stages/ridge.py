"""ridge: the same policies, cut by the criterion that knows the repair, and repaired by ridge regression."""

from __future__ import annotations

import shutil
from pathlib import Path

from ffprune.core.ridge import repair
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import copy_model, read_unit, set_unit, slice_model
from ffprune.models.view import ModelView, granule_indices
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, kept_granules, load, read_grams, read_orders
from ffprune.stages.policies import read_policy
from ffprune.stages.record import DENSE, GRAMS, ORDER, PRUNED, REPAIRED


def run(ctx: StageContext) -> None:
    """For every model of the prune stage its repaired twin (METHODS 7), under the same ``SPARSITY/POLICY``.

    The twin keeps as many granules of every unit, but those that the repair can do least without: a cut that is
    left as it is and a cut that is repaired want different granules kept.
    """
    params = ctx.params.ridge
    dense = ModelView(load(ctx.path(DENSE), ctx.params.compute, DTYPES["float32"]))
    grams = read_grams(dense, ctx.path(GRAMS))
    orders = read_orders(dense, ctx.path(ORDER), repaired=True)
    tokenizer = load_tokenizer(ctx.path(DENSE))
    storage = stored_dtype(ctx.path(DENSE))
    folders = pruned_folders(ctx.path(PRUNED))
    artifacts.check_room(ctx.path(REPAIRED), sum(f.stat().st_size for p in folders for f in p.iterdir()))
    with (
        artifacts.atomic_dir(ctx.path(REPAIRED)) as out,
        ctx.progress(len(folders) * len(dense.units), "ridge") as bar,
    ):
        for folder in folders:
            policy = folder.with_name(f"{folder.name}.json")
            kept = kept_granules(orders, read_policy(policy)[0])
            model = copy_model(dense.model)
            slice_model(ModelView(model), kept)
            view = ModelView(model)
            for index, granules in enumerate(kept):
                parts = dense.unit_linears(index)
                if len(granules) < parts.granules:
                    columns = granule_indices(granules, parts.width[parts.last_role])
                    weight = parts.last.weight.detach().cpu()
                    repaired = repair(weight, grams[index], columns, params.damping, params.absolute)
                    set_unit(view, index, read_unit(view, index).replace_last(repaired.to(model.device)))
                bar.update(1, model=f"{folder.parent.name}/{folder.name}")
            model.to(dtype=storage)  # type: ignore[call-arg]
            place = out / folder.parent.name
            save_model(model, tokenizer, place / folder.name)
            shutil.copyfile(policy, place / policy.name)


def pruned_folders(root: Path) -> list[Path]:
    """Model folders ``SPARSITY/POLICY`` below ``root``, in a fixed order."""
    return sorted(path for path in root.glob("*/*") if path.is_dir())
