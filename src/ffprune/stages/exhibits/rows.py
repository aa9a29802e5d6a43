"""Results of methods as rows: of the comparison, and of the one table that a sweep or a grid of models has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ffprune.stages.exhibits.results import Result, on_target, ratio, removed_prunable, removed_whole, text_of

#: What studies call their texts, the one that is compared by first.
TEXTS = ("test", "wikitext2", "ptb", "c4")
#: Heads of the table of several models; :func:`cells` fills its rows.
HEADS = ("Model", "Method", "Granularity", "Sparsity", "Perplexity", "Ratio to dense", "Removed, model", "Seconds")
#: What stands below that table.
NOTE = "Sparsity is the target; † marks a method that removed another share of the prunable weights."
Groups = dict[tuple[str, float], list[Result]]


def rows_of(results: Iterable[Result], model: str, texts: Sequence[str] = TEXTS) -> list[dict[str, object]]:
    """What was measured on one model, by granularity and sparsity, best first.

    Args:
        results: of methods on this model.
        model: its name.
        texts: perplexities are those of the first of these that any result has; without one there are no rows.
    """
    found = list(results)
    text = text_of(found, texts)
    if text is None:
        return []
    return [_row(result, text, model) for members in groups_of(found, text).values() for result in members]


def groups_of(results: Iterable[Result], text: str) -> Groups:
    """Results by granularity and sparsity, in each the best on ``text`` first."""
    groups: Groups = {}
    for result in results:
        groups.setdefault((_granularity(result), float(result["recipe"]["sparsity"])), []).append(result)
    return {key: sorted(groups[key], key=lambda r: ratio(r, text) or float("inf")) for key in sorted(groups)}


def label_of(result: Result) -> str:
    """The method's label, with what tells its variants apart."""
    recipe = result["recipe"]
    parts = [
        str(recipe["label"]),
        *([str(recipe["pattern"])] if recipe["pattern"] else []),
        *([f"{recipe['trials']:,} trials"] if recipe["trials"] else []),
        *([f"from {recipe['first']['sparsity']:.0%}"] if recipe["first"] else []),
        *([f"{recipe['calibration_windows']:,} windows"] if recipe["calibration_windows"] else []),
        *([f"{recipe['quantize']['bits']} bits"] if recipe["quantize"] else []),
    ]
    return ", ".join(parts) + ("" if on_target(result) else " †")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, under :data:`HEADS`."""

    def number(key: str, style: str) -> str:
        return "" if row[key] is None else format(row[key], style)

    return [
        str(row["model"]),
        str(row["label"]),
        str(row["granularity"]),
        number("sparsity_target", ".2f"),
        number("perplexity", ",.2f"),
        number("ratio_to_dense", ".3f"),
        number("removed_model", ".1%"),
        f"{row['decide_seconds'] + row['prune_seconds']:,.0f}",
    ]


def _granularity(result: Result) -> str:
    """What methods are compared under: SliceGPT and SVD-LLM make tensors smaller as structured pruning does."""
    if result["recipe"]["compressor"] == "none":
        return ""
    return "unstructured" if result["granularity"] == "unstructured" else "structured"


def _row(result: Result, text: str, model: str) -> dict[str, object]:
    return {
        "model": model,
        "method": result["name"],
        "label": label_of(result),
        "granularity": result["granularity"],
        "sparsity_target": result["recipe"]["sparsity"],
        "perplexity": result["perplexity"].get(text, {}).get("value"),
        "ratio_to_dense": ratio(result, text),
        "removed_prunable": removed_prunable(result),
        "removed_model": removed_whole(result),
        "params_after": result["params_after"],
        "compression": result["compression"],
        "decide_seconds": result["seconds"]["decide"],
        "prune_seconds": result["seconds"]["prune"],
        "trials": result["trials"],
    }
