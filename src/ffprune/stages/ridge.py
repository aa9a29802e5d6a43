"""ridge: fold what was removed into what is left, by ridge regression on the last map of every cut unit."""

from __future__ import annotations

import shutil
from pathlib import Path

from ffprune.core.ridge import repair
from ffprune.models.checkpoint import load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import read_unit, set_unit
from ffprune.models.view import ModelView, granule_indices
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.inputs import DTYPES, load, read_grams
from ffprune.stages.record import DENSE, GRAMS, PRUNED, REPAIRED


def run(ctx: StageContext) -> None:
    """Repair every model of the prune stage (METHODS 7), under the same ``SPARSITY/POLICY``."""
    params = ctx.params.ridge
    dense = ModelView(load(ctx.path(DENSE), ctx.params.compute, DTYPES["float32"]))
    grams = read_grams(dense, ctx.path(GRAMS))
    tokenizer = load_tokenizer(ctx.path(DENSE))
    storage = stored_dtype(ctx.path(DENSE))
    folders = pruned_folders(ctx.path(PRUNED))
    artifacts.check_room(ctx.path(REPAIRED), sum(f.stat().st_size for p in folders for f in p.iterdir()))
    with (
        artifacts.atomic_dir(ctx.path(REPAIRED)) as out,
        ctx.progress(len(folders) * len(dense.units), "ridge") as bar,
    ):
        for folder in folders:
            view = ModelView(load(folder, ctx.params.compute, DTYPES["float32"]))
            kept = artifacts.read_tensors(folder.with_name(f"{folder.name}.kept.safetensors"))
            for index, unit in enumerate(dense.units):
                granules = kept[unit.name]
                if len(granules) < unit.granules:
                    parts = dense.unit_linears(index)
                    columns = granule_indices(granules, parts.width[parts.last_role])
                    weight = repair(parts.last.weight.detach(), grams[index], columns, params.damping, params.absolute)
                    set_unit(view, index, read_unit(view, index).replace_last(weight))
                bar.update(1, model=f"{folder.parent.name}/{folder.name}")
            place = out / folder.parent.name
            view.model.to(dtype=storage)  # type: ignore[call-arg]
            save_model(view.model, tokenizer, place / folder.name)
            for beside in (f"{folder.name}.json", f"{folder.name}.kept.safetensors"):
                shutil.copyfile(folder.with_name(beside), place / beside)


def pruned_folders(root: Path) -> list[Path]:
    """Model folders ``SPARSITY/POLICY`` below ``root``, in a fixed order."""
    return sorted(path for path in root.glob("*/*") if path.is_dir())
