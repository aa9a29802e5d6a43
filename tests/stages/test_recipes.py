"""The catalogue, and that every recipe of the papers is one that can be run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.cut import REPAIRS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.errors import ParameterError
from ffprune.core.importance import CRITERIA
from ffprune.core.saliency import SALIENCIES
from ffprune.stages.compressing import check_save
from ffprune.stages.exhibits.papers import comparison_methods, exhibits
from ffprune.stages.recipes import catalogue, check_onload, print_catalogue, rows_of
from ffprune.stages.sections import Compute, Recipe


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


PLAIN = {
    **dict.fromkeys(("repair", "pattern", "calibration_windows", "quantize", "trials", "first")),
    "label": "toy",
    "model": "dense",
    "sparsity": 0.5,
    "allocator": "uniform",
    "compressor": "mask",
    "criterion": "wanda",
    "inputs": "pruned",
    "tokens": "equal",
    "zero_shot": False,
    "speed": False,
    "save": False,
}


COMPUTE = {
    "device": "cpu",
    "dtype": "float32",
    "device_map": None,
    "onload": "model",
    "threads": 1,
    "matmul_precision": "highest",
}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"pattern": "2-4"}, ["pattern '2-4'", "N:M", "such as 2:4"]),
        ({"pattern": "4:2"}, ["pattern '4:2'", "0 < N < M"]),
        ({"pattern": "2:4", "sparsity": 0.6}, ["pattern 2:4", "sparsity 0.6", "2 of 4", "Set sparsity to 0.5"]),
        (
            {"tokens": "weighted", "compressor": "slice", "criterion": "wanda_column"},
            ["tokens weighted", "mask, sparsegpt", "set tokens to equal"],
        ),
        ({"save": True, "compressor": "svd_llm", "criterion": None}, ["save", "none, mask", "Set save to false"]),
        ({"allocator": "evopress", "trials": 10}, ["methods.toy.trials is 10", "takes 11", "Raise trials"]),
    ],
)
def test_what_cannot_work_is_refused(parts: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ParameterError) as caught:
        entry = Recipe(**{**PLAIN, **parts})
        rows_of("toy", entry)
        check_save("toy", entry)
    assert all(words in str(caught.value) for words in said), str(caught.value)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"compressor": "slicegpt", "criterion": None}, ["compressor slicegpt and compute.onload block", "svd_llm"]),
        ({"allocator": "trace_rank"}, ["allocator trace_rank", "uniform", "Set compute.onload to model"]),
        ({"allocator": "dynamic_programming"}, ["allocator dynamic_programming"]),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_blocks_take_turns(parts: dict[str, Any], said: list[str]) -> None:
    entry, where = Recipe(**{**PLAIN, **parts}), Compute(**COMPUTE)
    check_onload("toy", entry, where)
    check_onload("toy", Recipe(**PLAIN), where.model_copy(update={"onload": "block"}))
    with pytest.raises(ParameterError) as caught:
        check_onload("toy", entry, where.model_copy(update={"onload": "block"}))
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_a_pattern_with_its_own_sparsity_goes() -> None:
    for pattern, sparsity in (("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("2:3", 1 - 2 / 3)):
        rows_of("toy", Recipe(**{**PLAIN, "pattern": pattern, "sparsity": sparsity}))


def test_a_transfer_to_where_it_comes_from_is_refused() -> None:
    entry = {**PLAIN, "allocator": "warm", "trials": 16}
    Recipe(**{**entry, "first": {"sparsity": 0.4, "trials": 16}})
    with pytest.raises(ValueError, match=r"sparsity and first\.sparsity are the same"):
        Recipe(**{**entry, "first": {"sparsity": 0.5, "trials": 16}})
