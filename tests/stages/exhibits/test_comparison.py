from __future__ import annotations

from typing import Any

from ffprune.stages.exhibits.comparison import comparison
from ffprune.stages.exhibits.papers import comparison_methods, exhibit
from tests.stages.made_up import DENSE, SETTING, result


def made_up() -> dict[str, dict[str, Any]]:
    recipes = comparison_methods().recipes(full=False) | exhibit("ff-table-2").recipes(full=False)
    return {name: result(name, recipe) for name, recipe in recipes.items()}


def perplexity(value: float | None) -> dict[str, Any]:
    return {"test": {"value": value, "dense": DENSE, "windows": 40, "tokens": 40920}}


def test_methods_are_grouped_and_the_best_comes_first() -> None:
    results = made_up()
    results["flap-20"]["perplexity"] = perplexity(22.0)
    results["handmade-ridge-20"]["perplexity"] = perplexity(None)
    page = comparison(results, SETTING)
    titles = [line for line in page.markdown.splitlines() if line.startswith("## ")]
    assert titles == ["## Not pruned", "## Structured, 20% sparsity", "## Unstructured, 50% sparsity"]
    rows = [row for row in page.rows if row["sparsity_target"] == 0.2]
    assert {row["granularity"] for row in rows} == {"structured", "hidden width", "rank"}
    assert rows[0]["method"] == "flap-20"
    assert rows[-1]["method"] == "handmade-ridge-20"
    finite = [row["ratio_to_dense"] for row in rows[:-1]]
    assert finite == sorted(finite, key=float)  # type: ignore[arg-type]
    assert "| FLAP | 22.00 (1.029) | 20.0% | 15.8% | 113,281,344 | 0 |" in page.markdown
    assert "| Inner FFNs, ridge | not finite |" in page.markdown
    assert "40 windows, 40,920 tokens" in page.markdown


def test_a_method_that_removed_another_share_is_marked() -> None:
    page = comparison(made_up(), SETTING).markdown
    assert "| SliceGPT † |" in page
    assert "†: removed another share" in page
    assert "| FLAP † |" not in page
    assert "| FastForward, ridge, 45 trials |" in page


def test_the_figure_has_three_panels_a_group() -> None:
    figure = comparison(made_up(), SETTING).figure
    assert figure is not None
    figure.draw_without_rendering()
    assert len(figure.axes) == 9


def test_nothing_run_yet() -> None:
    page = comparison({}, SETTING)
    assert "No method has been run yet" in page.markdown
    assert (page.rows, page.figure) == ([], None)
