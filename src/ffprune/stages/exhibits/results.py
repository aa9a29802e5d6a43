"""What the result of a method (metrics/methods/NAME.json) says, for the tables and figures made of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffprune.stages.artifacts import read_json
from ffprune.stages.record import METHOD, PIPELINE_MODEL

Result = Mapping[str, Any]
#: Further from the target than this, a method does not stand at equal removed parameters (share of the prunable).
TOLERANCE = 0.005
#: Tasks of lm-evaluation-harness and what the papers call them.
TASKS = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
    "truthfulqa_mc2": "TruthfulQA",
}


@dataclass(frozen=True)
class Measured:
    """A row of a table whose method was run.

    Attributes:
        label: as the table calls the row.
        sparsity: the target, removed / prunable.
        result: what was measured.
    """

    label: str
    sparsity: float
    result: Result


@dataclass(frozen=True)
class Subject:
    """What is drawn.

    Attributes:
        title: of the figure.
        text: of the perplexities; None when no result has one of those asked for.
        measured: the rows that have a result, in order of sparsity.
        traces: rows of data/sensitivity/traces.json.
    """

    title: str
    text: str | None
    measured: Sequence[Measured]
    traces: Sequence[Mapping[str, Any]]

    def ratio(self, result: Result) -> float | None:
        """Perplexity over the dense model's on the figure's text."""
        return None if self.text is None else ratio(result, self.text)


@dataclass(frozen=True)
class Setting:
    """What every result of a study has in common.

    Attributes:
        model: the model's name.
        text: what the test text is.
        dtype: number format of forward passes.
        seed: of every random choice.
    """

    model: str
    text: str
    dtype: str
    seed: int


def results_of(folder: Path, names: Iterable[str]) -> dict[str, Result]:
    """What has been measured of these methods; perplexities get those of the same model, dense, beside them.

    Args:
        folder: of the project or the study.
        names: entries of ``methods``.

    Returns:
        Method name -> result, of those that have one; ``dense`` is None where the model itself was not measured.
    """
    files = {name: folder / METHOD.of(name).metrics[0] for name in names}
    found: dict[str, Any] = {name: read_json(file) for name, file in files.items() if file.is_file()}
    dense = {model_of(r): r["perplexity"] for r in found.values() if is_dense(r)}
    for result in found.values():
        own = dense.get(model_of(result), {})
        for text, measured in result["perplexity"].items():
            measured["dense"] = own[text]["value"] if text in own else None
    return found


def model_of(result: Result) -> str:
    """The dense model that a method was run on; the only one there was, where the recipe is older than the choice."""
    return str(result["recipe"].get("model", PIPELINE_MODEL))


def is_dense(result: Result) -> bool:
    """Whether the method left the model as it is."""
    return result["recipe"]["compressor"] == "none" and not result["recipe"]["quantize"]


def text_of(results: Iterable[Result], texts: Sequence[str]) -> str | None:
    """The first of ``texts`` on which a result has a perplexity."""
    known = {name for result in results for name in result["perplexity"]}
    return next((text for text in texts if text in known), None)


def ratio(result: Result, text: str) -> float | None:
    """Perplexity over the dense model's; None when it is not finite, or one of the two was not measured."""
    found = result["perplexity"].get(text)
    if found is None or found["value"] is None or found["dense"] is None:
        return None
    return float(found["value"]) / float(found["dense"])


def accuracy(result: Result, task: str) -> float | None:
    """Share of right answers, normalised by length where the task has that; None when it was not asked."""
    metrics = result["zero_shot"].get(task, {})
    found = metrics.get("acc_norm", metrics.get("acc"))
    return None if found is None else float(found)


def removed_prunable(result: Result) -> float:
    """Share of the prunable weights that are gone."""
    return 1 - float(result["prunable_after"]) / float(result["prunable_before"])


def on_target(result: Result) -> bool:
    """Whether a method removed the share of the prunable weights that it was asked to remove."""
    return abs(removed_prunable(result) - float(result["recipe"]["sparsity"])) <= TOLERANCE


def removed_whole(result: Result) -> float:
    """Share of the whole model's parameters that are gone."""
    return 1 - float(result["params_after"]) / float(result["params_before"])


def total_seconds(result: Result) -> float:
    """Time to decide and to prune."""
    return float(result["seconds"]["decide"]) + float(result["seconds"]["prune"])


def last_search(result: Result) -> list[Mapping[str, Any]]:
    """Trials at the recipe's sparsity, without those of a search that it was transferred from."""
    trials = result["recipe"]["trials"]
    return list(result["episodes"][-trials:]) if trials else []


def layer_of(matrix: str) -> int:
    """3 of ``layers.3.gate``."""
    return int(matrix.split(".")[1])


def role_of(matrix: str) -> str:
    """``gate`` of ``layers.3.gate``."""
    return matrix.rpartition(".")[2]
