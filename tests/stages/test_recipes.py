"""The catalogue, and that every recipe of the papers is one that can be run."""

from __future__ import annotations

import json

import pytest

from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.cut import REPAIRS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.importance import CRITERIA
from ffprune.core.saliency import SALIENCIES
from ffprune.stages.exhibits.papers import comparison_methods, exhibits
from ffprune.stages.recipes import catalogue, print_catalogue, rows_of
from ffprune.stages.sections import Recipe


def test_every_row_of_every_table_is_listed_with_its_source() -> None:
    names = {(row["kind"], row["name"]) for row in catalogue()}
    for kind, table in (("allocator", ALLOCATORS), ("compressor", COMPRESSORS), ("repair", REPAIRS)):
        assert {(kind, name) for name in table} <= names
    assert {("criterion", name) for name in (*SALIENCIES, *CRITERIA, "flap")} <= names
    for row in catalogue():
        assert row["paper"], row
        assert row["section"], row
        assert row["granularities"], row


@pytest.mark.parametrize("as_json", [True, False])
def test_the_catalogue_is_printed(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    print_catalogue(as_json)
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown) == catalogue()
    assert all(name in shown for name in (*ALLOCATORS, *COMPRESSORS, *SALIENCIES, *CRITERIA))


@pytest.mark.parametrize("full", [False, True])
def test_recipes_of_papers_and_comparison_go_together(full: bool) -> None:
    recipes = dict(comparison_methods().recipes(full))
    for exhibit in exhibits().values():
        recipes |= exhibit.recipes(full)
    for name, recipe in recipes.items():
        rows_of(name, Recipe(**recipe))


def test_the_comparison_has_every_allocator_and_compressor() -> None:
    recipes = comparison_methods().recipes(True).values()
    left_out = set(ALLOCATORS) - {recipe["allocator"] for recipe in recipes}
    assert not left_out
    assert {recipe["compressor"] for recipe in recipes} == set(COMPRESSORS)
