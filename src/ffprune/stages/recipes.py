"""What a recipe of the section ``methods`` may say: what cannot work is refused before work starts."""

from __future__ import annotations

import json
import math
from typing import Any

from ffprune.allocate.request import Allocator
from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.cut import FLUCTUATION, REPAIRS
from ffprune.compress.table import COMPRESSORS, Compressor
from ffprune.core.errors import ParameterError
from ffprune.core.importance import CRITERIA
from ffprune.core.masks import parse_pattern
from ffprune.core.saliency import SALIENCIES
from ffprune.core.tables import look_up
from ffprune.stages.sections import Compute, Recipe


def rows_of(name: str, recipe: Recipe) -> tuple[Allocator, Compressor]:
    """The allocator and the compressor of a recipe whose parts go together.

    Args:
        name: of the entry, for messages.
        recipe: the entry; what is only measured or kept (``save``) is not read.

    Raises:
        ParameterError: an unknown name, or parts that do not go together.
    """
    where = f"methods.{name}"
    allocator = look_up(ALLOCATORS, recipe.allocator, f"{where}.allocator")
    compressor = look_up(COMPRESSORS, recipe.compressor, f"{where}.compressor")
    _check_units(where, recipe, allocator, compressor)
    _check_choice(where, "criterion", recipe.criterion, compressor.criteria, recipe.compressor)
    # `repair: null` leaves a cut as it is.
    if recipe.repair is not None or not compressor.repairs:
        _check_choice(where, "repair", recipe.repair, compressor.repairs, recipe.compressor)
    if recipe.pattern is not None:
        _check_pattern(where, recipe, recipe.pattern, compressor)
    if recipe.quantize is not None and not compressor.quantises:
        raise ParameterError(
            f"{where}.quantize was asked for with compressor {recipe.compressor}",
            f"GPTQ follows {_names(n for n, row in COMPRESSORS.items() if row.quantises)}",
            "Change the compressor, or set quantize to null",
        )
    if recipe.tokens == "weighted" and not compressor.quantises:
        raise ParameterError(
            f"{where}.tokens weighted was asked for with compressor {recipe.compressor}",
            f"Tokens can be weighted for {_names(n for n, row in COMPRESSORS.items() if row.quantises)}",
            "Change the compressor, or set tokens to equal",
        )
    if "curves" in allocator.needs and recipe.criterion == FLUCTUATION:
        raise ParameterError(
            f"{where}.criterion {FLUCTUATION} was asked for with allocator {recipe.allocator}",
            f"Its loss curves need a criterion that says what error a cut leaves: {_names(CRITERIA)}",
            "Change the criterion or the allocator",
        )
    _check_search(where, recipe, allocator)
    return allocator, compressor


def check_onload(name: str, recipe: Recipe, compute: Compute) -> tuple[Allocator, Compressor]:
    """:func:`rows_of`, and refuse what needs the whole model on the device where blocks take turns there.

    Raises:
        ParameterError: as :func:`rows_of`; or a recipe that is not for ``compute.onload: block``.
    """
    allocator, compressor = rows_of(name, recipe)
    if compute.onload == "model":
        return allocator, compressor
    # Gradients need all weights at once.
    differentiating = {"curves", "sensitivity"} & set(allocator.needs)
    if differentiating or not compressor.by_block:
        part = f"allocator {recipe.allocator}" if differentiating else f"compressor {recipe.compressor}"
        fitting = _names(n for n, row in ALLOCATORS.items() if not {"curves", "sensitivity"} & set(row.needs))
        raise ParameterError(
            f"methods.{name} was asked for with {part} and compute.onload block",
            f"It needs the whole model at once; block by block go the allocators {fitting} and the compressors "
            f"{_names(n for n, row in COMPRESSORS.items() if row.by_block)}",
            "Set compute.onload to model, with compute.device cpu where the model is larger than the device",
        )
    return allocator, compressor


def _check_units(where: str, recipe: Recipe, allocator: Allocator, compressor: Compressor) -> None:
    kind = compressor.granularity
    if not compressor.has_units:
        if recipe.allocator != "uniform":
            raise ParameterError(
                f"{where}.allocator {recipe.allocator} was asked for with compressor {recipe.compressor}",
                f"{recipe.compressor} has no units to share a budget among",
                "Set allocator to uniform",
            )
        if kind == "none" and recipe.sparsity != 0:
            raise ParameterError(
                f"{where}.sparsity {recipe.sparsity:g} was asked for with compressor none",
                "It removes nothing",
                "Set sparsity to 0, or choose a compressor",
            )
    elif kind not in allocator.granularities:
        fitting = _names(n for n, row in ALLOCATORS.items() if kind in row.granularities)
        raise ParameterError(
            f"{where}.allocator {recipe.allocator} was asked for with compressor {recipe.compressor}, whose units are "
            f"{kind}",
            f"Allocators for {kind} units: {fitting}",
            "Change the allocator or the compressor",
        )


def _check_choice(where: str, key: str, given: str | None, allowed: tuple[str, ...], compressor: str) -> None:
    if given is None and allowed:
        raise ParameterError(
            f"{where}.{key} is null with compressor {compressor}",
            f"It needs one of {_names(allowed)}",
            f"Set {key}",
        )
    if given is not None and given not in allowed:
        raise ParameterError(
            f"{where}.{key} {given!r} was asked for with compressor {compressor}",
            f"It takes {_names(allowed) or 'none'}",
            f"Change {key}" if allowed else f"Set {key} to null",
        )


def _check_pattern(where: str, recipe: Recipe, pattern: str, compressor: Compressor) -> None:
    if not compressor.patterns or recipe.allocator != "uniform":
        raise ParameterError(
            f"{where}.pattern {pattern} was asked for with allocator {recipe.allocator} and compressor "
            f"{recipe.compressor}",
            "An N:M pattern removes the same share of single weights everywhere: allocator uniform, compressor "
            f"{_names(n for n, row in COMPRESSORS.items() if row.patterns)}",
            "Change them, or set pattern to null",
        )
    kept, group = parse_pattern(pattern)
    if not math.isclose(recipe.sparsity, 1 - kept / group):
        raise ParameterError(
            f"{where}.pattern {pattern} was asked for with sparsity {recipe.sparsity:g}",
            f"It removes {group - kept} of {group} weights",
            f"Set sparsity to {1 - kept / group}, or pattern to null",
        )


def _check_search(where: str, recipe: Recipe, allocator: Allocator) -> None:
    if allocator.searches != (recipe.trials is not None):
        raise ParameterError(
            f"{where}.trials is {recipe.trials} with allocator {recipe.allocator}",
            "A searching allocator needs a number of trials" if allocator.searches else "It makes no trials",
            "Set trials" if allocator.searches else "Set trials to null",
        )
    if recipe.trials is not None and recipe.trials < allocator.least_trials:
        raise ParameterError(
            f"{where}.trials is {recipe.trials} with allocator {recipe.allocator}",
            f"Its smallest generation takes {allocator.least_trials}",
            "Raise trials",
        )
    if recipe.first is not None and not allocator.transfers:
        raise ParameterError(
            f"{where}.first was asked for with allocator {recipe.allocator}",
            f"Policy transfer continues an agent: {_names(n for n, row in ALLOCATORS.items() if row.transfers)}",
            "Change the allocator, or set first to null",
        )


def catalogue() -> list[dict[str, Any]]:
    """Every allocator, compressor, criterion and repair as a row, for ``ffprune methods``."""
    rows = [
        _row("allocator", name, row, list(row.granularities), list(row.needs) + ["trials"] * row.searches)
        for name, row in ALLOCATORS.items()
    ]
    for name, compressor in COMPRESSORS.items():
        needs = ["criterion"] * bool(compressor.criteria) + ["calibration text"] * (name != "none")
        row = _row("compressor", name, compressor, [compressor.granularity], needs)
        rows.append(
            row
            | {
                "criteria": list(compressor.criteria),
                "repairs": list(compressor.repairs),
                "patterns": ["2:4", "4:8"] if compressor.patterns else [],
                "quantises": compressor.quantises,
            }
        )
    for name, saliency in SALIENCIES.items():
        rows.append(_row("criterion", name, saliency, ["unstructured"], ["whole Gram"] * saliency.needs_inverse))
    for name, criterion in CRITERIA.items():
        rows.append(_row("criterion", name, criterion, ["structured"], ["whole Gram"] * criterion.whole))
    rows.append(_row("criterion", FLUCTUATION, ALLOCATORS["flap"], ["structured"], ["mean and diagonal"]))
    for name, repair in REPAIRS.items():
        rows.append(_row("repair", name, repair, ["structured"], ["whole Gram"] * repair.whole))
    return rows


def print_catalogue(as_json: bool) -> None:
    """The catalogue as JSON, or as a table a kind."""
    rows = catalogue()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        table = Table(title=kind, title_justify="left")
        for column in ("name", "paper", "section", "granularities", "needs"):
            table.add_column(column)
        for row in rows:
            if row["kind"] == kind:
                cells = (row["name"], row["paper"], row["section"])
                table.add_row(*cells, ", ".join(row["granularities"]), ", ".join(row["needs"]))
        console.print(table)


def _row(kind: str, name: str, row: Any, granularities: list[str], needs: list[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "paper": row.paper,
        "section": row.section,
        "granularities": granularities,
        "needs": needs,
    }


def _names(names: Any) -> str:
    return ", ".join(names)
