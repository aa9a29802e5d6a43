"""The report page as text: what it says, and that it needs nothing from outside."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from ffprune.core.units import Allocation
from ffprune.stages.figures import charts, interactive
from ffprune.stages.page import Content, render
from ffprune.stages.page.tables import headlines, sizes, zero_shot
from ffprune.stages.table import result_rows
from tests.stages.figures.test_charts import SEARCHED, UNITS

DENSE: dict[str, Any] = {
    "perplexity": 20.0,
    "nll_stderr": 0.15,
    "params": 2_000_000,
    "prunable_params": 1_000_000,
    "bytes": 4_000_000,
    "macs_per_token": 1_900_000,
    "kv_cache_bytes_per_token": 23_040,
    "path": "models/dense",
    "zero_shot": {"wiki": {"acc": 0.75, "acc_stderr": 0.11, "n": 16}},
    "prefill_tokens_per_s": 938.19,
    "decode_tokens_per_s": 26.85,
    "prefill_over_dense": 1.0,
    "decode_over_dense": 1.0,
}
PRUNED = {
    **{key: DENSE[key] for key in ("macs_per_token", "prefill_tokens_per_s", "decode_tokens_per_s")},
    "budget": "parameters",
    "sparsity_target": 0.2,
    "sparsity": 0.2001,
    "dense_perplexity": 20.0,
    "params": 1_600_000,
    "prunable_params": 800_000,
    "bytes": 3_000_000,
    "kv_cache_bytes_per_token": 23_040,
    "prefill_over_dense": 1.25,
    "decode_over_dense": 1.5,
    "path": "models/repaired/0.2/searched+ridge",
}


def summary(**perplexities: float | None) -> dict[str, Any]:
    found = perplexities or {"uniform": 45.0, "searched+ridge": 27.0, "broken": None}
    return {
        "protocol": {"text": "test.txt", "windows": 6, "seqlen": 64, "tokens": 378, "dtype": "float32", "seed": 0},
        "dense": DENSE,
        "rows": [{"method": method, "perplexity": value, **PRUNED} for method, value in found.items()],
    }


def content(**changes: Any) -> Content:
    told = summary()
    traces = [
        {"matrix": f"layers.0.{role}", "weights": 10, "trace": 1.0, "trace_stderr": 0.1, "sensitivity": 0.1}
        for role in ("q", "down")
    ]
    curves = [{"unit": f"layers.0.{kind}", "loss": [3.0, 2.0, 1.0, 0.5]} for kind in ("attention", "ffn")]
    shown = [
        charts.policy({"sparsity 0.2": SEARCHED}),
        charts.policy({name: Allocation.dense(UNITS) for name in "abcd"}, "policies"),
        charts.episodes({"search": []}),
        charts.front({"search": {"front": [], "candidates": []}}),
        charts.sensitivity(traces, curves),
        charts.perplexity(DENSE, told["rows"]),
        charts.costs(DENSE, told["rows"]),
    ]
    record = {
        "run_id": "r1",
        "git.commit": "c0ffee",
        "git.dirty": "true",
        "version.torch": "2.13.0",
        "inputs": {"models/dense": "aa.dir"},
    }
    made = Content(
        told,
        {chart.name: chart for chart in shown},
        {"model": {"name": "Tiny", "sha256": "5a5a"}, "text": {"test": {"articles": 2, "characters": 1234}}},
        record,
        {"seed": 0, "data": {"source": {"test": {"kind": "local", "path": "text.txt"}}}},
    )
    return replace(made, **changes)


class Outline(HTMLParser):
    """Tags with their attributes, and text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", [""]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open[-1] not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass


@pytest.fixture(scope="module")
def text() -> str:
    return render(content())


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    return Outline(text)


def test_the_same_content_gives_the_same_bytes(text: str) -> None:
    assert render(content()) == text


def test_nothing_is_fetched(text: str, outline: Outline) -> None:
    for tag, attributes in outline.tags:
        for name in ("src", "href", "action", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    policy = next(a["content"] for _, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';") and "http" not in policy
    own = text.replace(interactive.library(), "")
    assert len(own) < len(text)
    assert not re.search(r"https?://|@import|url\(", own)


def test_numbers_are_those_of_the_summary(outline: Outline) -> None:
    told = summary()
    for row in result_rows(told):
        for cell in row:
            assert cell in outline.text
    best = headlines(told)[0]
    assert (best["method"], best["ratio"], best["perplexity"]) == ("searched+ridge", "1.350", "27.00")
    assert best["parameters"] == "2,000,000 → 1,600,000 (-20.0%)"
    assert best["cache"] == "23,040 (as before)"
    assert "1.350 times the perplexity" in outline.text
    assert sizes(told).rows[0] == ["dense", "", "1,000,000", "1,900,000", "23,040", "938.2", "26.9"]
    asked = zero_shot(told)
    assert asked is not None and asked.rows == [["dense", "", "wiki", "acc", "0.750", "0.110", "16"]]


def test_it_tells_where_everything_comes_from(outline: Outline) -> None:
    for said in (
        "5a5a",
        "aa.dir",
        "c0ffee",
        "2.13.0",
        "r1",
        "1,234",
        "git checkout c0ffee",
        "make run",
        "path: text.txt",
    ):
        assert said in outline.text, said
    assert "Tracked files differed" in outline.text


def test_it_can_be_read_without_seeing_it(outline: Outline) -> None:
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in outline.tags:
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "figure":
            assert {attributes["aria-labelledby"], attributes["aria-describedby"]} <= set(identifiers)
        if attributes.get("class") == "plot":
            assert attributes["aria-label"]
    assert ("html", {"lang": "en"}) in outline.tags


def test_names_are_text_and_not_html() -> None:
    evil = "<img src=x onerror=alert(1)>"
    rows = [{**row, "method": evil} for row in summary()["rows"]]
    made = content(
        summary={**summary(), "rows": rows},
        downloaded={"model": {"name": evil}, "text": {}},
        charts={**content().charts, "policy": charts.policy({evil: SEARCHED})},
        params={"seed": 0, "data": {"source": {"path": "</pre><script>alert(1)</script>"}}},
    )
    found = Outline(render(made))
    assert "img" not in {tag for tag, _ in found.tags}
    assert [tag for tag, _ in found.tags].count("script") == [tag for tag, _ in Outline(render(content())).tags].count(
        "script"
    )


def test_what_is_not_there_is_left_out_or_told() -> None:
    told = summary(uniform=None)
    told["dense"] = {key: value for key, value in DENSE.items() if key != "zero_shot"}
    found = Outline(render(content(summary=told, record={})))
    assert headlines(told) == []
    assert "Zero-shot" not in found.text
    assert "Not recorded" in found.text
    assert "git checkout" not in found.text
