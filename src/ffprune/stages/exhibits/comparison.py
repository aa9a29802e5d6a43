"""``ffprune compare``: every method of a study beside the others, at the same share of removed parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ffprune.export.markdown import markdown_table
from ffprune.stages.exhibits.bars import ratio_bars
from ffprune.stages.exhibits.marks import color, panels, plain_ticks
from ffprune.stages.exhibits.page import Rendered, off_target, perplexity_shown, recoveries, windows_shown
from ffprune.stages.exhibits.results import Result, Setting, ratio, removed_prunable, removed_whole, text_of
from ffprune.stages.exhibits.rows import TEXTS, Groups, groups_of, label_of, rows_of


def comparison(results: Mapping[str, Result], setting: Setting) -> Rendered:
    """Perplexity, what is really gone, and the time it took; grouped by granularity and sparsity, best first.

    Args:
        results: method name -> content of metrics/methods/NAME.json.
        setting: what the results have in common.
    """
    text = text_of(results.values(), TEXTS)
    groups = groups_of(results.values(), text) if text else {}
    parts = [f"# Methods compared on {setting.model}"]
    if not text:
        parts.append("No method has been run yet.")
    for group, members in groups.items():
        parts += [f"## {_title(group)}", _table(members, str(text))]
    if text:
        notes = [
            windows_shown(list(results.values()), text, setting),
            f"Computed in {setting.dtype}, seed {setting.seed}.",
        ]
        notes += [*off_target(list(results.values())), *recoveries(list(results.values()))]
        parts += [" ".join(notes), "![Methods compared](comparison.png)"]
    return Rendered(
        "\n\n".join(parts) + "\n",
        rows_of(results.values(), setting.model),
        _figure(groups, str(text), setting) if text else None,
    )


def _title(group: tuple[str, float]) -> str:
    granularity, sparsity = group
    return f"{granularity.capitalize()}, {sparsity:.0%} sparsity" if granularity else "Not pruned"


def _table(members: Sequence[Result], text: str) -> str:
    rows = [
        [
            label_of(result),
            perplexity_shown(result, text).shown if text in result["perplexity"] else f"no {text} text",
            f"{removed_prunable(result):.1%}",
            f"{removed_whole(result):.1%}",
            f"{result['params_after']:,}",
            f"{result['seconds']['decide']:,.0f}",
            f"{result['seconds']['prune']:,.0f}",
        ]
        for result in members
    ]
    return markdown_table(
        ["Method", "Perplexity", "Removed, prunable", "Removed, model", "Parameters", "Decide (s)", "Prune (s)"], rows
    )


def _figure(groups: Groups, text: str, setting: Setting) -> Figure:
    """A row of panels a group: perplexity, what is gone, time."""
    sizes = [len(members) for members in groups.values()]
    figure, axes = panels(
        len(groups),
        3,
        13,
        1.0 + 0.32 * sum(sizes) + 0.75 * len(groups),
        height_ratios=[size + 1.2 for size in sizes],
        width_ratios=[2.2, 1.2, 1.2],
    )
    for number, (group, members) in enumerate(groups.items()):
        left, middle, right = axes[3 * number : 3 * number + 3]
        places = range(len(members))
        ratio_bars(left, [label_of(result) for result in members], members, [ratio(result, text) for result in members])
        left.set_title(_title(group), loc="left", fontsize=10)
        for place, result in enumerate(members):
            middle.plot(100 * removed_prunable(result), place, "o", color=color(result), markersize=7)
            middle.plot(100 * removed_whole(result), place, "o", color=color(result), markersize=7, fillstyle="none")
            right.plot(max(result["seconds"]["decide"], 0.1), place, "D", color=color(result), markersize=6)
            right.plot(
                max(result["seconds"]["prune"], 0.1), place, "D", color=color(result), markersize=6, fillstyle="none"
            )
        middle.axvline(100 * group[1], color="#333333", linewidth=0.8, linestyle=":")
        right.set_xscale("log")
        plain_ticks(right, "x")
        for ax in (middle, right):
            ax.set_ylim(left.get_ylim())
            ax.set_yticks(places, [])
        most = 100 * max(0.05, group[1], *(removed_prunable(result) for result in members))
        middle.set_xlim(-0.05 * most, 1.08 * most)
        if not number:
            middle.set_title("removed (%): ● prunable, ○ model", fontsize=9)
            right.set_title("seconds: ◆ decide, ◇ prune", fontsize=9)
    axes[-3].set_xlabel("perplexity / dense")
    figure.suptitle(f"Methods compared on {setting.model}", fontsize=12)
    return figure
