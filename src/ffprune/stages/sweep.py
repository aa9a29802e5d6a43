"""A sweep: models x granularities x sparsities x methods. Every model is a study, and one table shows them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffprune.export.markdown import markdown_table
from ffprune.stages.exhibits.page import Rendered
from ffprune.stages.exhibits.results import results_of
from ffprune.stages.exhibits.rows import HEADS, NOTE, cells, rows_of
from ffprune.stages.exhibits.sweeping import sweep_recipes
from ffprune.stages.launch import launch_sweep
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.recipes import check_onload
from ffprune.stages.record import METHOD
from ffprune.stages.study import FOLDER, open_study, publish

PAGE = FOLDER / "sweep.md"


@dataclass(frozen=True)
class Part:
    """The part of a sweep that is one model's.

    Attributes:
        model: a profile.
        folder: its study.
        recipes: method name -> recipe.
    """

    model: str
    folder: Path
    recipes: Mapping[str, Any]

    @property
    def stages(self) -> list[str]:
        """The stages to run in the study."""
        return [METHOD.of(name).name for name in self.recipes]


def prepare(
    models: Sequence[str], granularities: Sequence[str], sparsities: Sequence[float], methods: Sequence[str], full: bool
) -> list[Part]:
    """Make or extend the study of every model; none named: the profile in use.

    Raises:
        ParameterError: an unknown name, or a recipe whose parts do not go together.
        MissingInput: this is not the project's folder.
    """
    recipes = sweep_recipes(granularities, sparsities, methods, full)
    parts = []
    chosen: list[str | None] = [*dict.fromkeys(models)] or [None]
    for model in chosen:
        name, folder = open_study(model, recipes)
        given = load_params(folder / PARAMS_FILE)
        for recipe in recipes:
            check_onload(recipe, given.methods[recipe], given.compute)
        parts.append(Part(name, folder, recipes))
    return parts


def run_sweep(
    models: Sequence[str],
    granularities: Sequence[str],
    sparsities: Sequence[float],
    methods: Sequence[str],
    full: bool,
    show: bool,
    workers: int,
) -> None:
    """Check everything, then become the flow; or only show what has been measured."""
    parts = prepare(models, granularities, sparsities, methods, full)
    if show:
        publish_table(parts)
        return
    count = sum(len(part.recipes) for part in parts)
    print(f"{count} methods in {', '.join(str(part.folder) for part in parts)}", flush=True)
    lists = {"--model": models, "--granularity": granularities, "--sparsity": sparsities, "--method": methods}
    words = [word for option, values in lists.items() for value in values for word in (option, str(value))]
    launch_sweep([*words, *(["--full"] if full else []), "--workers", str(workers)])


def table(parts: Sequence[Part]) -> Rendered:
    """Every method that was measured, model by model; what was not is named below."""
    rows: list[dict[str, object]] = []
    missing = []
    for part in parts:
        results = results_of(part.folder, part.recipes)
        rows += rows_of(results.values(), part.model)
        missing += [f"`{name}` on {part.model}" for name in part.recipes if name not in results]
    page = ["# Sweep", markdown_table(HEADS, [cells(row) for row in rows])]
    if missing:
        page.append(f"Not measured: {', '.join(missing)}.")
    page.append(NOTE)
    return Rendered("\n\n".join(page) + "\n", rows, None)


def publish_table(parts: Sequence[Part]) -> Rendered:
    """Print, write and record the table."""
    shown = table(parts)
    publish(PAGE, f"sweep {' '.join(part.model for part in parts)}", shown, load_params().tracking)
    return shown
