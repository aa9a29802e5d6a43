from __future__ import annotations

from typing import Any

import pytest

from ffprune.stages.exhibits import bars, lines, retentions
from ffprune.stages.exhibits.marks import COLORS, color, family
from ffprune.stages.exhibits.papers import comparison_methods, exhibit
from ffprune.stages.exhibits.results import Measured, Subject
from tests.stages.made_up import result

RECIPES = {**comparison_methods().recipes(full=True), **exhibit("ms-table-4").recipes(full=False)}


def subject(*measured: Measured) -> Subject:
    return Subject("a title", "test", measured, ())


def measured(name: str, sparsity: float, **changes: Any) -> Measured:
    return Measured(name, sparsity, result(name, RECIPES[name], **changes))


def perplexity(ratio: float | None) -> dict[str, Any]:
    return {"test": {"value": None if ratio is None else 20 * ratio, "dense": 20.0, "windows": 1, "tokens": 9}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", "dense"),
        ("gptq-q4g128", "gptq"),
        ("wanda-50", "wanda"),
        ("magnitude-50", "magnitude"),
        ("owl-50", "owl"),
        ("sparsegpt-50", "sparsegpt"),
        ("mixed-isc-50", "trace_rank"),
        ("flap-20", "flap"),
        ("slicegpt-20", "slicegpt"),
        ("uniform-norm-ridge-20", "uniform"),
        ("fastforward-20-t240", "fastforward"),
    ],
)
def test_a_method_is_known_by_who_decides_or_what_it_prunes_with(name: str, expected: str) -> None:
    assert family(RECIPES[name]) == expected


def test_every_method_has_a_colour_of_its_own() -> None:
    assert all(color({"recipe": recipe}) for recipe in RECIPES.values())
    assert len(set(COLORS.values())) == len(COLORS)


def test_ratios_of_decades_go_on_a_logarithmic_axis_and_the_others_do_not() -> None:
    near = bars.perplexity(
        subject(
            measured("wanda-50", 0.5, perplexity=perplexity(1.5)), measured("owl-50", 0.5, perplexity=perplexity(None))
        )
    )
    assert near.axes[0].get_xscale() == "linear"
    assert [text.get_text() for text in near.axes[0].texts] == ["1.500", "not finite"]
    far = bars.perplexity(
        subject(
            measured("wanda-50", 0.5, perplexity=perplexity(1.5)), measured("owl-50", 0.5, perplexity=perplexity(4000))
        )
    )
    assert far.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in far.axes[0].texts] == ["1.500", "4,000"]


def test_a_sweep_stands_at_what_was_really_removed() -> None:
    line = lines.sweep(subject(measured("slicegpt-20", 0.2), measured("slicegpt-30", 0.3))).axes[0].lines[0]
    assert line.get_xdata()[0] == pytest.approx(9, abs=0.01)  # type: ignore[index]


def test_running_means_pass_over_trials_that_are_not_finite() -> None:
    figure = lines.search(subject(measured("eas-20-t240", 0.2)))
    means = figure.axes[1].lines[1].get_ydata()
    assert len(means) == 239 - 12 + 1 + 1  # type: ignore[arg-type]


def test_a_panel_a_kind_of_unit() -> None:
    figure = retentions.policy(subject(measured("fastforward-20-t240", 0.2), measured("owl-50", 0.5)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Attention", "FFN", "Weight matrices"]
