from __future__ import annotations

import pytest

from ffprune.stages.exhibits.papers import exhibit
from ffprune.stages.exhibits.results import (
    accuracy,
    last_search,
    layer_of,
    ratio,
    removed_prunable,
    removed_whole,
    role_of,
    text_of,
)
from tests.stages.made_up import DENSE, result

RECIPE = exhibit("ms-table-2").recipes(full=False)["sparsegpt-50"]


def test_ratio_is_none_when_there_is_no_finite_number() -> None:
    measured = {"test": {"value": 2 * DENSE, "dense": DENSE}, "ptb": {"value": None, "dense": DENSE}}
    found = result("a", RECIPE, perplexity=measured)
    assert ratio(found, "test") == pytest.approx(2)
    assert ratio(found, "ptb") is None
    assert ratio(found, "c4") is None
    found["perplexity"]["test"]["dense"] = None
    assert ratio(found, "test") is None


def test_the_first_text_that_there_is() -> None:
    assert text_of([result("a", RECIPE)], ("wikitext2", "test")) == "test"
    assert text_of([result("a", RECIPE)], ("ptb",)) is None
    assert text_of([], ("test",)) is None


def test_accuracy_is_normalised_where_it_can_be() -> None:
    asked = result("a", RECIPE, zero_shot={"piqa": {"acc": 0.5, "acc_norm": 0.6}, "boolq": {"acc": 0.0}})
    assert accuracy(asked, "piqa") == 0.6
    assert accuracy(asked, "boolq") == 0.0
    assert accuracy(asked, "arc_easy") is None


def test_removed_shares_differ_by_what_is_never_pruned() -> None:
    found = result("a", RECIPE)
    assert removed_prunable(found) == pytest.approx(0.5)
    assert removed_whole(found) == pytest.approx(0.5 * 106168320 / 134515008)


def test_the_search_before_a_transfer_is_left_out() -> None:
    name = "sparsitysolver-30-t15-from20t45"
    found = result(name, exhibit("ss-table-6").recipes(full=False)[name])
    assert len(found["episodes"]) == 60
    assert [row["trial"] for row in last_search(found)] == list(range(45, 60))
    assert last_search(result("a", RECIPE)) == []


def test_parts_of_a_matrix_name() -> None:
    assert (layer_of("layers.12.gate"), role_of("layers.12.gate")) == (12, "gate")
