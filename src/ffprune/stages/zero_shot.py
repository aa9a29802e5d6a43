"""Zero-shot tasks as a stage asks them: by name or file, and ``wiki_continuation``, which is made from a text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ffprune.evaluate.cloze import CLOZE_TASK, build_cloze_task
from ffprune.evaluate.harness import evaluate_tasks
from ffprune.models.checkpoint import load_tokenizer
from ffprune.stages.sections import Tasks


def check_text(text: Path, params: Tasks, seed: int) -> None:
    """Refuse a text that ``wiki_continuation`` cannot be made from, where it is asked for.

    Raises:
        FfpruneError: see :func:`~ffprune.evaluate.cloze.build_cloze_task`.
    """
    if CLOZE_TASK in params.tasks:
        with tempfile.TemporaryDirectory(prefix="ffprune-task-") as folder:
            build_cloze_task(text.read_text(encoding="utf-8"), Path(folder), params.items, seed)


def ask(
    model: PreTrainedModel,
    tokenizer: Path,
    text: Path,
    params: Tasks,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics per task.

    Args:
        model: the model to ask.
        tokenizer: the dense model's folder.
        text: what ``wiki_continuation`` is made from.
        params: which tasks, how many items, and the folder with documents of stock tasks.
        seed: of the draws.
        progress: told of requests answered and in all.

    Returns:
        What :func:`ffprune.evaluate.harness.evaluate_tasks` found.

    Raises:
        FfpruneError: see :func:`~ffprune.evaluate.cloze.build_cloze_task` and
            :func:`~ffprune.evaluate.harness.evaluate_tasks`.
    """
    with tempfile.TemporaryDirectory(prefix="ffprune-task-") as folder:
        tasks = [
            str(build_cloze_task(text.read_text(encoding="utf-8"), Path(folder), params.items, seed))
            if task == CLOZE_TASK
            else task
            for task in params.tasks
        ]
        return evaluate_tasks(
            model,
            load_tokenizer(tokenizer),
            tasks,
            Path(params.include_path) if params.include_path else None,
            params.limit,
            params.batch_size,
            seed,
            Path(params.data),
            progress,
        )
