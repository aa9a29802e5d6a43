from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ffprune.core.errors import ParameterError
from ffprune.stages.exhibits.columns import COLUMNS, TEXTS
from ffprune.stages.exhibits.drawings import DRAWINGS
from ffprune.stages.exhibits.marks import COLORS, family
from ffprune.stages.exhibits.papers import FULL_ONLY, Choice, Printed, Row, comparison_methods, exhibit, exhibits
from ffprune.stages.params import validate
from ffprune.stages.recipes import rows_of
from ffprune.stages.sections import Recipe
from tests.toy import REPO

NAMES = [
    *(f"ff-table-{number}" for number in range(1, 5)),
    *(f"ss-table-{number}" for number in range(1, 7)),
    *(f"ss-fig-{number}" for number in (3, 4, 5, 6, 7, 11, 12, 13, 14)),
    *(f"ms-table-{number}" for number in range(1, 5)),
    *(f"ms-fig-{number}" for number in range(1, 4)),
]
KEYS = {
    "label",
    "model",
    "sparsity",
    "allocator",
    "compressor",
    "criterion",
    "repair",
    "pattern",
    "inputs",
    "tokens",
    "calibration_windows",
    "quantize",
    "trials",
    "first",
    "zero_shot",
    "speed",
    "save",
}


def every_recipe() -> list[tuple[str, dict[str, Any]]]:
    both = [table.recipes(full) for table in (*exhibits().values(), comparison_methods()) for full in (False, True)]
    return [(name, recipe) for recipes in both for name, recipe in recipes.items()]


def test_every_table_and_figure_is_there() -> None:
    assert sorted(exhibits()) == sorted(NAMES)
    assert exhibit("FF-Table-2").heading == "FF Table 2"
    assert exhibit("ss-fig-6").heading == "SS Fig. 6"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ParameterError, match=r"'ff-table-9' was asked for. Known names: ff-table-1, .*ss-table-6"):
        exhibit("ff-table-9")


def test_every_recipe_is_complete_and_named_for_what_it_is() -> None:
    by_name: dict[str, dict[str, Any]] = {}
    by_recipe: dict[str, str] = {}
    for name, recipe in every_recipe():
        assert recipe.keys() == KEYS
        assert Recipe.model_validate(recipe).model_dump() == recipe
        # A file name and a DVC stage name.
        assert re.fullmatch(r"[a-z0-9-]+", name), name
        made = {key: value for key, value in recipe.items() if key not in ("zero_shot", "speed")}
        assert by_name.setdefault(name, made) == made
        content = repr({key: value for key, value in made.items() if key != "label"})
        assert by_recipe.setdefault(content, name) == name, "one recipe under two names would run twice"
    assert len(by_name) > 70


def test_every_recipe_can_be_run() -> None:
    for name, recipe in every_recipe():
        rows_of(name, Recipe.model_validate(recipe))
        # Whole updates of the agents (15 trials, 16 of `warm`): so a transfer's trials are the last ones of its result.
        first = recipe["first"]["trials"] if recipe["first"] else 0
        assert not any(trials % 15 for trials in (recipe["trials"] or 0, first)), name
        assert family(recipe) in COLORS, name


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_model_is_always_there_for_the_ratios(name: str) -> None:
    recipes = exhibit(name).recipes(full=False)
    dense = [recipe for recipe in recipes.values() if recipe["compressor"] == "none" and not recipe["quantize"]]
    assert len(dense) == (1 if recipes else 0)


@pytest.mark.parametrize(
    ("table", "label", "expected"),
    [
        ("ff-table-2", "Ours (Calib)", ("fastforward", "slice", "wanda_column", "ridge")),
        ("ff-table-2", "FLAP", ("flap", "slice", "flap", "bias")),
        ("ss-table-2", "Ours", ("sparsitysolver", "slice", "activation_norm", None)),
        ("ss-table-1", "Ours", ("sparsitysolver", "mask", "wanda", None)),
        ("ss-fig-6", "AMC", ("amc", "slice", "activation_norm", None)),
        ("ms-table-1", "Uniform, OBS", ("uniform", "sparsegpt", "obs", None)),
        ("ms-table-2", "Ours", ("trace_rank", "sparsegpt", "isc", None)),
    ],
)
def test_a_row_is_the_papers_method(table: str, label: str, expected: tuple[str | None, ...]) -> None:
    found = next(entry for entry in exhibit(table).entries(full=True) if entry.label == label)
    assert tuple(found.recipe[key] for key in ("allocator", "compressor", "criterion", "repair")) == expected


def test_names_say_what_was_added() -> None:
    assert "dense" in exhibit("ff-table-2").recipes(full=False)
    assert "sparsitysolver-ridge-30-t15-from20t45" in exhibit("ss-table-6").recipes(full=False)
    assert "mixed-isc-50-c128-q4g128" in exhibit("ms-table-4").recipes(full=True)
    # What is measured besides perplexity is no part of a name: two tables that measure differently share a search.
    assert set(exhibit("ss-table-3").recipes(full=False)) == {
        *("dense", "slicegpt-20", "flap-20", "sparsitysolver-ridge-20-t45")
    }
    assert "wanda-50-2of4" in comparison_methods().recipes(full=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_has_a_recipe_or_a_reason(name: str) -> None:
    table = exhibit(name)
    for full in (False, True):
        for entry in table.entries(full):
            assert (entry.name is None) == bool(entry.reason) == (not entry.recipe)
        sparsities = [entry.sparsity for entry in table.entries(full)]
        assert sparsities == sorted(sparsities)
    assert all(entry.reason != FULL_ONLY for entry in table.entries(full=True))
    # The short variant has the same cells: what it leaves out, it says.
    shape = [[(e.label, e.sparsity) for e in table.entries(full)] for full in (False, True)]
    assert shape[0] == shape[1]
    assert 0 < table.minutes.short <= 20
    assert table.minutes.full >= table.minutes.short
    assert table.recipes(full=False) or table.traces


@pytest.mark.parametrize("name", NAMES)
def test_columns_drawings_and_models_are_known(name: str) -> None:
    table = exhibit(name)
    assert set(table.columns) <= {*COLUMNS, *TEXTS, "average"}
    assert table.drawing in DRAWINGS
    assert (table.printed is None) == ("fig" in name)
    for model in table.models.values():
        named = model.profile or model.like
        assert (named is None) == (model.reason is not None)
        assert named is None or (REPO / "profiles" / f"{named}.yaml").is_file()


def test_a_model_that_does_not_fit_says_what_it_needs() -> None:
    models = exhibit("ff-table-2").models
    assert models["LLaMA-V2-70B"].here.startswith("needs about 140 GB: a 70B model in 16 bits")
    assert models["OPT-125M"].here.startswith("`--model opt-125m`")


@pytest.mark.parametrize(
    ("name", "skipped", "tolerance"),
    [("ff-table-1", 3, 0.011), ("ss-table-3", 2, 0.011), ("ss-table-4", 2, 0.011), ("ms-table-3", 2, 0.11)],
)
def test_printed_averages_are_those_of_the_printed_tasks(name: str, skipped: int, tolerance: float) -> None:
    printed = exhibit(name).printed
    assert printed is not None
    for row in printed.rows:
        *tasks, average = (float(cell) for cell in row[skipped:])
        assert sum(tasks) / len(tasks) == pytest.approx(average, abs=tolerance), row


def test_numbers_are_kept_as_printed() -> None:
    printed = exhibit("ff-table-2").printed
    assert printed is not None
    assert printed.rows[1] == ("20%", "SliceGPT", "34.10", "16.58", "13.89", "6.99", "6.13", "6.86", "4.25")
    agreed = [exhibit(name).printed for name in ("ff-table-1", "ss-table-3", "ss-table-4")]
    dense = {tuple(p.rows[0][-8:]) for p in agreed if p is not None}
    assert len(dense) == 1


def test_a_plain_value_holds_for_both_variants() -> None:
    assert Choice[int].model_validate(3) == Choice(short=3, full=3)
    assert Choice[int | None].model_validate({"short": None, "full": 4}).of(full=True) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": "Ours", "methd": "wanda"}, "'methd' is unknown .did you mean 'method'"),
        ({"label": "Ours"}, "either a method or the reason"),
        ({"label": "Ours", "method": "wanda", "reason": "none"}, "either a method or the reason"),
    ],
)
def test_a_wrong_row_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        validate(values, Path("paper.yaml"), Row)


def test_a_printed_table_is_rectangular() -> None:
    with pytest.raises(ParameterError, match="2 columns, but 3 cells in: a . b . c"):
        validate({"columns": "x | y", "rows": ["a | b", "a | b | c"]}, Path("paper.yaml"), Printed)
