"""A project of a tiny random model and a small text: its sources, and parameters that run in seconds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from transformers import PreTrainedModel

from ffprune.models.checkpoint import save_model
from ffprune.stages import context
from ffprune.stages.params import read_yaml
from ffprune.stages.progress import Progress
from ffprune.stages.sections import Params
from tests.tiny import character_tokenizer, llama, opt, spread
from tests.toy import REPO

MODELS = {"llama": llama, "opt": opt}
METHODS = ("uniform", "uniform+ridge", "handmade+ridge", "searched", "searched+ridge", "searched+stream")
SMALL: dict[str, Any] = {
    "compute": {"dtype": "float32", "threads": 1, "matmul_precision": "highest"},
    "model": {"source": {"kind": "local", "path": "source/model"}, "storage_dtype": "float32"},
    "data": {"source": {"kind": "local", "path": "source/text.txt"}, "format": "plain"},
    "calibrate": {"windows": 8, "seqlen": 24, "batch_size": 4},
    "sensitivity": {
        "fisher": {"windows": 4, "seqlen": 16, "batch_size": 2},
        "hutchinson": {"probes": 2, "windows": 2, "seqlen": 8, "batch_size": 2, "product": "exact"},
    },
    "levels": {"step": 4},
    "search": {
        "episodes": 8,
        "step": 4,
        "seqlen": 16,
        "samples": 2,
        "final_samples": 3,
        "finalists": 1,
        "guide": {"imagined": 64},
    },
    "transfer": {"episodes": 8},
    "ridge": {"stream": {"windows": 8, "seqlen": 24, "batch_size": 2}},
    "evaluate": {
        "windows": 4,
        "seqlen": 24,
        "methods": list(METHODS),
        "speed": {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 1},
        "zero_shot": {"tasks": []},
    },
    "report": {"dpi": 50},
    "study": {
        "calibration": {"windows": 6, "seqlen": 24, "batch_size": 4},
        "windows": 4,
        "seqlen": 24,
        "fisher": {"windows": 4, "seqlen": 16, "batch_size": 2},
        "hutchinson": {"windows": 2, "seqlen": 8, "batch_size": 2},
        "search": {"seqlen": 16, "samples": 2, "final_samples": 3, "finalists": 1, "step": 2},
        "zero_shot": {"items": 4},
        "speed": {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 1},
    },
}


def merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes laid over values; a source, the models and the methods are replaced whole."""
    result = dict(values)
    for key, change in changes.items():
        inner = isinstance(change, Mapping) and key not in ("source", "models", "methods")
        result[key] = merged(result[key], change) if inner else change
    return result


@functools.cache
def _defaults() -> dict[str, Any]:
    return merged(read_yaml(REPO / "params.yaml"), SMALL)


def defaults() -> dict[str, Any]:
    """A copy, which a test may change."""
    return copy.deepcopy(_defaults())


def params(**changes: Any) -> Params:
    return Params.model_validate(merged(_defaults(), changes))


def write_text(path: Path, articles: int = 24) -> None:
    """Articles of words that repeat, so that inputs are correlated."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), size=n)) for n in draw.integers(2, 7, size=30)]
    parts = [f" = Title {i} = \n\n{' '.join(draw.choice(words, size=30))} .\n\n" for i in range(articles)]
    path.write_text("".join(parts))


def write_sources(root: Path, model: PreTrainedModel) -> None:
    """The model and the text that the download stage takes."""
    (root / "source").mkdir()
    save_model(spread(model), character_tokenizer(), root / "source" / "model")
    write_text(root / "source" / "text.txt")


def seen_bars(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Bars that stages show from now on, in this order."""
    bars: list[Progress] = []

    class Seen(Progress):
        def __enter__(self) -> Self:
            bars.append(self)
            return super().__enter__()

    monkeypatch.setattr(context, "Progress", Seen)
    return bars
