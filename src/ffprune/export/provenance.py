"""What is known of how a model came to be; what is not known is None, and is told as unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """The history of a model folder.

    Attributes:
        name: what to call the model.
        license: of the source model, as its publisher names it (an SPDX identifier as a rule).
        source: facts on the source model, in words: where it is from, revision, checksums, number format.
        base_model: its identifier on the Hugging Face hub.
        method: facts on the pruning, in words: policy, repair, budget, sparsity; or those of a recipe.
        data: sentences on the text: where it is from, what was calibrated and tested on.
        params: sections of params.yaml that the model was made with, as they were then.
        results: of the evaluation: ``protocol``, ``dense`` and ``row`` as in metrics/summary.json. Of a recipe
            ``dtype``, ``seed``, ``params_before``, ``params_after``, ``zero_shot`` and ``speed`` as in
            metrics/methods/NAME.json, and ``texts``: for each its ``text`` (path), ``windows``, ``seqlen``, ``tokens``,
            ``perplexity`` (None: not finite), ``stderr`` and ``dense``, the dense model's perplexity (None: not known).
        runs: stage -> identifier of the run that MLflow recorded.
        version: of ffprune that made the model; None: unknown.
    """

    name: str
    license: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    method: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    runs: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
