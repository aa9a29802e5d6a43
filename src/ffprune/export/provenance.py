"""What is known of how a model came to be; what is not known is None, and is told as unknown."""

from __future__ import annotations

from collections.abc import Mapping
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
        method: facts on the pruning, in words: policy, repair, budget, sparsity.
        params: sections of params.yaml that the model was made with, as they were then.
        results: of the evaluation: ``protocol``, ``dense`` and ``row`` as in metrics/summary.json.
        runs: stage -> identifier of the run that MLflow recorded.
    """

    name: str
    license: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    method: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    runs: Mapping[str, str] = field(default_factory=dict)
