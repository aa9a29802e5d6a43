from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ffprune.stages.artifacts import read_csv, write_csv
from ffprune.stages.exhibits.exhibit import NO_TRACES, render
from ffprune.stages.exhibits.papers import exhibit, exhibits
from tests.stages.made_up import DENSE, SETTING, result, traces

ONE_OF_EACH_DRAWING = {table.drawing: name for name, table in exhibits().items()}.values()
TEST = {"stderr": 0.01, "windows": 40, "tokens": 40920}


def made_up(name: str) -> dict[str, dict[str, Any]]:
    return {method: result(method, recipe) for method, recipe in exhibit(name).recipes(full=False).items()}


def line(markdown: str, *starts: str) -> list[str]:
    """Cells of the first table row that starts with these cells."""
    start = f"| {' | '.join(starts)} |"
    return next(row for row in markdown.splitlines() if row.startswith(start)).strip("| ").split(" | ")


@pytest.mark.parametrize("name", list(exhibits()))
def test_every_exhibit_is_rendered_with_and_without_results(name: str, tmp_path: Path) -> None:
    table = exhibit(name)
    page = render(table, made_up(name), SETTING, full=False, traces=traces() if table.traces else ())
    assert page.figure is not None
    if name in ONE_OF_EACH_DRAWING:
        page.figure.draw_without_rendering()  # lays it out: what does not fit is a warning, so an error
    write_csv(tmp_path / "rows.csv", page.rows)
    assert len(read_csv(tmp_path / "rows.csv")) == len(page.rows) > 0
    assert f"![{table.heading}]({name}.png)" in page.markdown

    empty = render(table, {}, SETTING, full=False)
    assert empty.figure is None
    assert ".png" not in empty.markdown
    assert (NO_TRACES if table.traces else "not run yet") in empty.markdown


def test_ours_come_first_then_the_papers_numbers() -> None:
    page = render(exhibit("ff-table-2"), made_up("ff-table-2"), SETTING, full=False).markdown
    ours, papers = page.split("## Printed in the paper, for its models")
    assert "## Measured: SmolLM2-135M-Instruct" in ours
    assert "34.10" in papers
    assert "34.10" not in ours
    assert "needs about 140 GB: a 70B model in 16 bits" in papers


def test_a_cell_has_the_perplexity_its_ratio_and_what_was_removed() -> None:
    results = made_up("ff-table-2")
    results["flap-20"]["perplexity"] = {"test": {"value": 1.5 * DENSE, "dense": DENSE, **TEST}}
    results["slicegpt-20"]["perplexity"] = {"test": {"value": None, "dense": DENSE, **TEST}}
    page = render(exhibit("ff-table-2"), results, SETTING, full=False)
    assert line(page.markdown, "20%", "FLAP")[2:] == ["32.07 (1.500)", "20.0%", "15.8%", "`flap-20`"]
    assert line(page.markdown, "20%", "SliceGPT")[2] == "not finite"
    assert line(page.markdown, "30%", "FLAP")[2] == "in the full variant: add --full"
    assert "test text (for WikiText2)" in page.markdown
    row = next(row for row in page.rows if row["method"] == "flap-20")
    assert (row["value"], row["ratio_to_dense"], row["reason"]) == (1.5 * DENSE, 1.5, None)
    left_out = next(row for row in page.rows if row["label"] == "EAS-based")
    assert (left_out["value"], left_out["reason"]) == (None, "in the full variant: add --full")


def test_what_was_not_run_says_so_in_its_cells() -> None:
    results = made_up("ms-table-2")
    del results["magnitude-50"]
    page = render(exhibit("ms-table-2"), results, SETTING, full=False).markdown
    assert line(page, "50%", "Magnitude") == ["50%", "Magnitude", "not run yet", *"″″″″", "`magnitude-50`"]


def test_texts_that_a_study_lacks_are_named() -> None:
    results = made_up("ms-table-2")
    page = render(exhibit("ms-table-2"), results, SETTING, full=False).markdown
    assert line(page, "50%", "Ours")[3:5] == ["no PTB text", "no C4 text"]
    for found in results.values():
        found["perplexity"]["ptb"] = {"value": 40.0, "dense": 32.0, **TEST, "windows": 7}
    page = render(exhibit("ms-table-2"), results, SETTING, full=False).markdown
    assert line(page, "50%", "Ours")[3:5] == ["40.00 (1.250)", "no C4 text"]
    assert "Perplexity of ptb: 7 windows, 40,920 tokens" in page


def test_the_protocol_stands_under_the_table() -> None:
    page = render(exhibit("ss-table-2"), made_up("ss-table-2"), SETTING, full=False).markdown
    assert (
        "Perplexity of the study's test text (Wikipedia articles): 40 windows, 40,920 tokens; "
        "in brackets the ratio to the dense model's. Computed in float32, seed 0." in page
    )


def test_what_removed_more_than_asked_is_marked_and_said_why() -> None:
    results = made_up("ss-table-2")
    page = render(exhibit("ss-table-2"), results, SETTING, full=False).markdown
    assert "†: removed another share" in page  # SliceGPT's sparsity is of the hidden width
    assert "untrained agent" not in page
    found = results["sparsitysolver-20-t45"]
    found["prunable_after"] = round(0.6 * found["prunable_before"])
    page = render(exhibit("ss-table-2"), results, SETTING, full=False).markdown
    assert line(page, "20%", "Ours")[3] == "40.0% †"
    assert line(page, "20%", "FLAP")[3] == "20.0%"
    assert "SS Alg. 1 limits what units keep and never fills up" in page


def test_zero_shot_averages_what_was_asked_and_counts_it() -> None:
    results = made_up("ff-table-1")
    results["flap-20"]["zero_shot"] = {
        "boolq": {"acc": 0.5, "n": 64},
        "piqa": {"acc": 0.1, "acc_norm": 0.7},
        "wiki_continuation": {"acc": 0.9},
    }
    page = render(exhibit("ff-table-1"), results, SETTING, full=False).markdown
    row = line(page, "20%", "FLAP")
    assert row[2:5] == ["50.00", "70.00", "not asked"]
    assert row[9:11] == ["90.00", "70.00 (of 3)"]
    assert "items: BoolQ 64, wiki_continuation 40" in page
    assert "repaired with C4 text" in line(page, "20%", "Ours (C4)")[2]


def test_search_cost_compression_and_speed() -> None:
    results = made_up("ff-table-4")
    results["eas-20-t45"]["seconds"] = {"decide": 1234.4, "prune": 100.0, "evaluate": 1.0}
    page = render(exhibit("ff-table-4"), results, SETTING, full=False).markdown
    assert line(page, "20%", "EAS-based")[2:4] == ["1,234", "1,334"]

    results = made_up("ms-table-4")
    page = render(exhibit("ms-table-4"), results, SETTING, full=False).markdown
    assert line(page, "50%", "Ours 50% + 4bit GPTQ")[5] == "8.0x"

    results = made_up("ss-fig-14")
    over_dense = {"prefill_over_dense": 1.25, "decode_over_dense": 1.1}
    results["slicegpt-20"]["speed"] = {"prefill_tokens_per_s": 500.0, "decode_tokens_per_s": 10.0, **over_dense}
    results["dense"]["speed"] = {}
    page = render(exhibit("ss-fig-14"), results, SETTING, full=False).markdown
    assert line(page, "20%", "SliceGPT")[2:4] == ["2.00 (1.25x)", "100.00 (1.10x)"]
    assert line(page, "0%", "Dense")[2:4] == ["not measured", "not measured"]


def test_episodes_are_those_of_the_last_search() -> None:
    results = made_up("ss-table-6")
    name = "sparsitysolver-30-t15-from20t45"
    results[name] |= {"trials": 60, "seconds": {"decide": 90.0, "prune": 1.0, "evaluate": 1.0}}
    page = render(exhibit("ss-table-6"), results, SETTING, full=False).markdown
    assert line(page, "30%", "Ours")[3:5] == ["15", "1.50"]
    assert line(page, "30%", "FLAP")[3:5] == ["no search", "no search"]


def test_without_the_dense_model_there_is_no_ratio() -> None:
    results = made_up("ff-table-4")
    for found in results.values():
        found["perplexity"] = {"test": {"value": 30.0, "dense": None, **TEST}}
    page = render(exhibit("ff-table-4"), results, SETTING, full=False)
    assert line(page.markdown, "20%", "FLAP")[4] == "30.00"
    assert page.figure is None


def test_a_recovery_is_told() -> None:
    results = made_up("ms-table-2")
    results["sparsegpt-50"]["facts"] = {"raised_damping": {"layers.0.q": 0.1, "layers.1.q": 0.1}}
    page = render(exhibit("ms-table-2"), results, SETTING, full=False).markdown
    assert "`sparsegpt-50`: damping raised for 2 matrices." in page
    assert "`mixed-isc-50`: damping" not in page


def test_csv_rows_of_a_figure_are_its_points() -> None:
    results = made_up("ss-fig-6")
    rows = render(exhibit("ss-fig-6"), results, SETTING, full=False).rows
    assert len(rows) == 90
    assert rows[1]["perplexity"] is None
    assert {row["label"] for row in rows} == {"Ours", "AMC"}
    rows = render(exhibit("ss-fig-13"), made_up("ss-fig-13"), SETTING, full=False).rows
    assert {row["trial"] for row in rows} == {0, 15, 30, 44}
    assert len(render(exhibit("ms-fig-2"), {}, SETTING, full=False, traces=traces()).rows) == 210


def test_nothing_is_drawn_when_no_perplexity_is_finite() -> None:
    results = made_up("ss-table-1")
    for found in results.values():
        found["perplexity"]["test"]["value"] = None
    page = render(exhibit("ss-table-1"), results, SETTING, full=False)
    assert page.figure is None
    assert "not finite" in page.markdown
