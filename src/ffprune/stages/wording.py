"""What a model card says in words of how a model was made: text, policy, repair, recipe.

All of it is told from records of a run, which may be of an older version: what a record does not have, or no table
knows, is left out or told by its name alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.cut import FLUCTUATION, REPAIRS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.importance import CRITERIA
from ffprune.core.saliency import SALIENCIES
from ffprune.sources.base import SPLITS, HubSource, Source, SplitSources, TextParams, describe

Params = Mapping[str, Any]
"""Sections of params.yaml as plain values."""

_POLICIES = {
    "uniform": "the same share of every layer's attention and FFN goes, as near as whole heads allow",
    "handmade": "FFN channels alone go, the same share of every layer but the first and the last",
    "searched": "how much of every layer goes was searched, by trials of really pruned models on validation text",
}
_CRITERIA = {
    "activation_norm": "what comes in with small norms goes first",
    "wanda_column": "what has small weights times norms of inputs goes first",
    "compensated_elimination": "what the others make up for best goes first, one after another",
    "magnitude": "small weights go first",
    "wanda": "small weights times norms of their inputs go first",
    "obd": "small squared weights times the Hessian's diagonal go first",
    "obs": "weights that the others make up for best go first",
    "isc": "the sum of the criteria of OBD and OBS",
    FLUCTUATION: "channels whose inputs fluctuate little go first",
}
_ALLOCATIONS = {
    "uniform": "the same share everywhere",
    "handmade": _POLICIES["handmade"],
    "owl": "more stays of layers with more outliers",
    "flap": "one threshold for the scores of all granules",
    "trace_rank": "more stays of matrices with a large Hessian trace",
    "trace_rank_layer": "more stays of layers with a large Hessian trace",
    "besa": "shares learnt block by block",
    "dynamic_programming": "the least sum of predicted losses, by dynamic programming",
    "fastforward": "searched by PPO",
    "sparsitysolver": "searched by PPO",
    "warm": "searched by PPO, from the least predicted losses on",
    "guided": "searched by trials that a model of the loss chooses",
    "amc": "searched by an agent that decides unit after unit",
    "eas": "searched by evolution",
    "evopress": "searched by evolution",
}
_COMPRESSORS = {
    "none": "nothing is removed",
    "mask": "single weights become zero, the others stay",
    "sparsegpt": "single weights become zero, the others of their row make up for them",
    "slice": "tensors become smaller",
    "slicegpt": "the hidden width becomes smaller",
    "svd_llm": "matrices become products of two smaller ones",
}
_REPAIRS = {
    "none": "the cut stays as it is",
    "bias": "a bias stands for the mean of what went",
    "mean+ridge": "a bias stands for the mean of what went, ridge regression for the rest",
    "ridge": "ridge regression fits the last linear map of every unit that was cut anew, to the unit's own output",
    "stream": "ridge regression block by block, behind what was cut before, towards the dense model's residual stream",
}
_PAPERS = {"FF": "FastForward Pruning", "SS": "SparsitySolver"}
_HEADS = {
    "group": "key/value heads with their query heads, and FFN channels",
    "query": "query heads, as many of every key/value group, and FFN channels",
}


class _Row(Protocol):
    """A row of a table of methods."""

    @property
    def paper(self) -> str: ...


def policy_facts(name: str, facts: Mapping[str, Any], params: Params) -> dict[str, str]:
    """How a model of the stages prune and ridge was made.

    Args:
        name: ``POLICY`` or ``POLICY+REPAIR``.
        facts: what stands beside the model's folder.
        params: what the stages read.
    """
    policy, _, repair = name.partition("+")
    repair = repair or "none"
    criterion = params.get("sensitivity", {}).get("plain_criterion" if repair == "none" else "criterion")
    removed = {f"{cost} removed": f"{share:.2%}" for cost, share in facts.get("removed", {}).items()}
    return {
        "policy": _explained(policy, _POLICIES.get(policy)),
        "repair": _explained(repair, _REPAIRS.get(repair)),
        **_if_known("criterion", criterion, _criterion),
        **_if_known("what goes", params.get("units", {}).get("heads"), lambda heads: _HEADS.get(heads, heads)),
        "granularity": str(facts["granularity"]),
        "budget": str(facts.get("budget", "parameters")),
        "target": f"{facts['sparsity_target']:g} of the budget",
        "sparsity": f"{facts['sparsity']:.4f} of the prunable weights",
        **removed,
    }


def recipe_facts(name: str, result: Mapping[str, Any]) -> dict[str, str]:
    """How a model of the stage ``method`` was made.

    Args:
        name: of the recipe.
        result: metrics/methods/NAME.json.
    """
    recipe = result["recipe"]
    quantize = recipe.get("quantize")
    facts = {
        "recipe": _explained(name, recipe.get("label")),
        "compressor": _named(recipe["compressor"], _COMPRESSORS, COMPRESSORS),
        "allocation": _named(recipe["allocator"], _ALLOCATIONS, ALLOCATORS),
        **_if_known("criterion", recipe.get("criterion"), _criterion),
        **_if_known("repair", recipe.get("repair"), lambda repair: _named(repair, _REPAIRS, REPAIRS)),
        **_if_known("pattern", recipe.get("pattern"), str),
        **_if_known("quantisation", quantize, lambda q: f"GPTQ, {q['bits']} bits in groups of {q['group_size']}"),
        **_if_known("trials", recipe.get("trials"), str),
        "target": f"{recipe['sparsity']:g} of the prunable weights",
        "sparsity": f"{result['sparsity']:.4f} of the prunable weights",
        "granularity": str(result["granularity"]),
    }
    if recipe["compressor"] == "none":
        # Nothing is removed, so there is nothing to allocate.
        facts = {key: facts[key] for key in ("recipe", "compressor", "quantisation") if key in facts}
    return facts


def text_words(params: Params) -> list[str]:
    """Where the text comes from, and how it is split."""
    try:
        data = TextParams.model_validate(params.get("data"))
    except ValidationError:
        return []
    if isinstance(data.source, SplitSources):
        return [f"{split.capitalize()} text: {_source(getattr(data.source, split))}." for split in SPLITS]
    assert data.shares is not None  # of one source
    shares = ", ".join(f"{getattr(data.shares, split):.0%} {split}" for split in SPLITS)
    return [f"Text: {_source(data.source)}. Whole documents of it are {shares}."]


def policy_text(name: str, params: Params) -> list[str]:
    """What a model of the stages prune and ridge was made on; arguments as :func:`policy_facts`."""
    policy, _, repair = name.partition("+")
    words = [_calibration_words("Calibrated on", params.get("calibrate", {}))]
    if repair == "stream":
        words.append(_calibration_words("The repair read", params.get("ridge", {}).get("stream", {})))
    if policy == "searched":
        words.append(_search_words(params.get("search", {})))
    return [sentence for sentence in words if sentence]


def recipe_text(recipe: Mapping[str, Any], params: Params) -> list[str]:
    """What a model of the stage ``method`` was made on."""
    if recipe["compressor"] == "none" and not recipe.get("quantize"):
        return []
    study = params.get("study", {})
    own = {"windows": recipe["calibration_windows"]} if recipe.get("calibration_windows") else {}
    words = [_calibration_words("Calibrated on", {**study.get("calibration", {}), **own})]
    if recipe.get("trials"):
        words.append(_search_words(study.get("search", {})))
    return [sentence for sentence in words if sentence]


def tested_on(protocol: Mapping[str, Any]) -> str:
    """What a model was tested on: ``text``, ``windows``, ``seqlen``."""
    return f"Tested on {_windows(protocol['windows'], protocol['seqlen'])} of `{protocol['text']}`."


def _calibration_words(start: str, section: Params) -> str:
    """A sentence on a section with ``windows`` and ``seqlen``; empty where it does not have them."""
    if not {"windows", "seqlen"} <= set(section):
        return ""
    return f"{start} {_windows(section['windows'], section['seqlen'])} of the calibration text."


def _search_words(section: Params) -> str:
    """A sentence on a section with ``samples``, ``final_samples`` and ``seqlen``; empty as above."""
    if not {"samples", "final_samples", "seqlen"} <= set(section):
        return ""
    return (
        f"A trial of the search read {_windows(section['samples'], section['seqlen'])} of the validation text at most, "
        f"the final comparison {section['final_samples']:,} other windows."
    )


def _windows(count: int, length: int) -> str:
    return f"{count:,} windows of {length:,} tokens ({count * length:,} tokens)"


def _source(source: Source) -> str:
    parts = [describe(source)]
    if isinstance(source, HubSource):
        parts += [f"{key} {value}" for key, value in (("config", source.config), ("split", source.split)) if value]
    return ", ".join(parts)


def _criterion(name: str) -> str:
    return _named(name, _CRITERIA, {**SALIENCIES, **CRITERIA, FLUCTUATION: ALLOCATORS["flap"]})


def _named(name: str, words: Mapping[str, str], table: Mapping[str, _Row]) -> str:
    """A name, in words, with the paper that a table names."""
    row = table.get(name)
    if row is None or row.paper in ("-", "ffprune"):
        return _explained(name, words.get(name))
    papers = ", ".join(_PAPERS.get(paper, paper) for paper in row.paper.split(", "))
    return _explained(name, f"{words.get(name, '')} ({papers})".strip())


def _explained(name: str, words: str | None) -> str:
    return name if not words else f"{name}: {words}"


def _if_known(key: str, value: Any, words: Any) -> dict[str, str]:
    return {} if value is None else {key: words(value)}
