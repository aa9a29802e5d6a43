"""Carrying a recipe out on one model: the cut, the reconstruction, the rotation, the quantisation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ffprune.compress import slicegpt, svd_llm, unstructured
from ffprune.compress.cut import REPAIRS, cut
from ffprune.compress.experts import check_experts
from ffprune.compress.follow import follow
from ffprune.compress.table import COMPRESSORS
from ffprune.compress.unstructured import Quantisation, WeightPruning
from ffprune.core.errors import ParameterError
from ffprune.core.units import Allocation
from ffprune.models.calibration import Calibration
from ffprune.models.view import ModelView
from ffprune.stages.sections import Recipe, Study


def check_save(name: str, recipe: Recipe) -> None:
    """Refuse to keep a model that no folder can hold.

    Raises:
        ParameterError: ``save`` with a compressor whose models are not of their family any more.
    """
    if recipe.save and not COMPRESSORS[recipe.compressor].saves:
        raise ParameterError(
            f"methods.{name}.save was asked for with compressor {recipe.compressor}",
            "Its shortcuts and factors have no place in a model of this family; models can be saved of "
            f"{', '.join(n for n, row in COMPRESSORS.items() if row.saves)}",
            "Set save to false",
        )


def check_model(name: str, recipe: Recipe, view: ModelView) -> None:
    """Refuse what this model cannot do, before any work.

    Raises:
        FfpruneError: a family that the compressor does not know, or that has no place for what is to be saved.
    """
    check_experts(view, f"methods.{name}", recipe.compressor, recipe.repair, recipe.quantize is not None)
    if recipe.compressor == "slicegpt":
        slicegpt.check(view)
        slicegpt.dimensions(view.model.config.hidden_size, recipe.sparsity)
    biased = recipe.repair is not None and REPAIRS[recipe.repair].biases
    if recipe.save and biased and any(last.bias is None for last in view.last_maps):
        raise ParameterError(
            f"methods.{name}.save was asked for with repair {recipe.repair}",
            f"It gives the last maps of units a bias, and those of a {type(view.model).__name__} have none",
            "Choose another repair, or set save to false",
        )


def compress(
    recipe: Recipe,
    study: Study,
    view: ModelView,
    calibration: Calibration,
    allocation: Allocation | None,
) -> dict[str, Any]:
    """Prune a view's model, in place.

    Args:
        recipe: the entry of ``methods``.
        study: what all recipes share.
        view: the dense model in float32.
        calibration: text to calibrate on, and how.
        allocation: how much of every unit stays; None where the compressor has no units.

    Returns:
        Facts about how it went.
    """
    text, dtype, progress = (calibration.windows, calibration.batch_size), calibration.dtype, calibration.progress
    if recipe.compressor == "slicegpt":
        width = slicegpt.dimensions(view.model.config.hidden_size, recipe.sparsity)
        return asdict(slicegpt.compress(view, width, *text, progress))
    if recipe.compressor == "svd_llm":
        found = svd_llm.compress(view, recipe.sparsity, calibration.grams(view))
        damped = sum(matrix.damping > 0 for matrix in found.matrices)
        return {key: value for key, value in asdict(found).items() if key != "matrices"} | {"damped": damped}
    dense_inputs = recipe.inputs == "dense"
    if recipe.compressor == "slice":
        assert allocation is not None
        assert recipe.criterion is not None
        given = view, allocation, *text, recipe.criterion
        if recipe.repair == "stream":
            return {"dampings": follow(*given, study.damping, dtype, progress)}
        unreached = cut(*given, recipe.repair or "none", study.damping, dense_inputs, dtype, progress)
        return {"unreached_experts": unreached} if unreached else {}
    if recipe.compressor == "none" and recipe.quantize is None:
        return {}
    how = WeightPruning(
        criterion=recipe.criterion or "magnitude",
        reconstruct=recipe.compressor == "sparsegpt",
        pattern=recipe.pattern,
        quantisation=Quantisation(**recipe.quantize.model_dump()) if recipe.quantize else None,
        damping=study.damping,
        weighted=recipe.tokens == "weighted",
    )
    kept = allocation or Allocation.dense(view.weight_units)
    matrices = unstructured.prune(view, kept, *text, how, dense_inputs, dtype, progress)
    return {"raised_damping": {m.name: m.damping for m in matrices if m.damping > study.damping}}
