"""Every column of the papers' tables by name: what it shows of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffprune.core.tables import look_up
from ffprune.stages.exhibits.page import Cell, perplexity_shown
from ffprune.stages.exhibits.papers import Exhibit
from ffprune.stages.exhibits.results import TASKS, Result, accuracy, last_search, text_of, total_seconds

#: Column -> names of its text in a result, the best first: a study's own test text stands in for WikiText2.
TEXTS = {"wikitext2": ("wikitext2", "test"), "ptb": ("ptb",), "c4": ("c4",)}


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    header: str
    cell: Callable[[Result], Cell]


def columns_of(exhibit: Exhibit, found: Sequence[Result]) -> dict[str, Column]:
    """The exhibit's columns; tasks that the study asked besides stand before the average, which counts them."""
    asked = [name for name in exhibit.columns if name in TASKS]
    others = sorted({task for result in found for task in result["zero_shot"]} - set(asked)) if asked else []
    columns: dict[str, Column] = {}
    for name in exhibit.columns:
        if name in TEXTS:
            title = "WikiText2" if name == "wikitext2" else name.upper()
            columns[name] = _perplexity(title, TEXTS[name], found)
        elif name == "average":
            columns |= {task: _accuracy(task) for task in others}
            columns[name] = _average([*asked, *others])
        else:
            columns[name] = look_up(COLUMNS, name, f"{exhibit.name}: column")
    return columns


def _perplexity(title: str, texts: Sequence[str], found: Sequence[Result]) -> Column:
    text = text_of(found, texts)

    def cell(result: Result) -> Cell:
        if text is None or text not in result["perplexity"]:
            return Cell(f"no {title} text")
        return perplexity_shown(result, text)

    return Column(f"test text (for {title})" if text == "test" else title, cell)


def _accuracy(task: str) -> Column:
    def cell(result: Result) -> Cell:
        share = accuracy(result, task)
        return Cell("not asked") if share is None else Cell(f"{100 * share:.2f}", share)

    return Column(TASKS.get(task, task), cell)


def _average(tasks: Sequence[str]) -> Column:
    def cell(result: Result) -> Cell:
        shares = [share for task in tasks if (share := accuracy(result, task)) is not None]
        if not shares:
            return Cell("not asked")
        mean = sum(shares) / len(shares)
        return Cell(f"{100 * mean:.2f} (of {len(shares)})", mean)

    return Column("Average", cell)


def _speed(kind: str) -> Callable[[Result], Cell]:
    def cell(result: Result) -> Cell:
        speed = result["speed"]
        if not speed:
            return Cell("not measured")
        seconds, over_dense = 1000 / speed[f"{kind}_tokens_per_s"], float(speed[f"{kind}_over_dense"])
        return Cell(f"{seconds:,.2f} ({over_dense:.2f}x)", seconds, over_dense)

    return cell


def _number(value: float, style: str, unit: str = "") -> Cell:
    return Cell(f"{value:{style}}{unit}", float(value))


def _of_search(value: Callable[[Result], float], style: str) -> Callable[[Result], Cell]:
    return lambda result: _number(value(result), style) if result["trials"] else Cell("no search")


COLUMNS: dict[str, Column] = {
    "search_seconds": Column("Search (s)", lambda result: _number(result["seconds"]["decide"], ",.0f")),
    "total_seconds": Column("Search and prune (s)", lambda result: _number(total_seconds(result), ",.0f")),
    "episodes": Column("Episodes", _of_search(lambda result: len(last_search(result)), ",d")),
    "episode_seconds": Column(
        "Episode time (s)", _of_search(lambda result: result["seconds"]["decide"] / result["trials"], ".2f")
    ),
    "compression": Column("Ratio", lambda result: _number(result["compression"], ".1f", "x")),
    "prefill_seconds": Column("Prefill (s per 1,000 tokens, speed-up)", _speed("prefill")),
    "decode_seconds": Column("Decode (s per 1,000 tokens, speed-up)", _speed("decode")),
    **{task: _accuracy(task) for task in TASKS},
}
