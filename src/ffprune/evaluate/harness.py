"""Zero-shot tasks through lm-evaluation-harness, and the project's own small task (METHODS 8)."""

from __future__ import annotations

import bisect
import copy
import difflib
import io
import json
import logging
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffprune.core.errors import MissingInput, NoNetwork, ParameterError, TooLittleText

#: Name of the task that :func:`build_cloze_task` writes.
CLOZE_TASK = "wiki_continuation"

_TASK = """\
# Which of four sentences follows the context? Written by ffprune from its own test split.
# data_files is relative to this file; ffprune finds it from anywhere, lm_eval itself from this folder.
task: wiki_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: wiki_continuation.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_CONTEXT_CHARACTERS = 160  # a few sentences; lm-eval reads the context once per choice
_SENTENCE_CHARACTERS = range(40, 101)
_CHOICES = 4
_NEAREST = 12  # distractors are drawn from at least this many sentences, where there are as many
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]%][.!?])[\"”]?\s+(?=[\"“(]?[A-Z])")
_LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
_CHATTY = ("lm_eval", "datasets", "transformers", "huggingface_hub")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy on tasks, by lm-eval's own model wrapper, task loader and evaluator.

    Log-softmax is taken in float32 whatever the model's dtype. lm-eval's own prints, logs and bars are
    silenced, and the state of the global random generators is put back. No chat template is applied.

    Args:
        model: a causal language model; put into eval mode while it runs, then back.
        tokenizer: its tokenizer; not changed.
        tasks: names of tasks, groups or tags, or paths of task files (``*.yaml``). A task file's relative
            ``data_files`` are looked for next to that file. Names are looked up in ``include_path`` first;
            lm-eval's stock tasks, which need the hub, are indexed (10 s or more) only for names not found
            there. Task files may name Python functions, which run: use files you trust.
        include_path: folder with task files, searched for names.
        limit: items per task, the first ones; None for all.
        batch_size: sequences per forward pass.
        seed: of every random generator that tasks use.

    Returns:
        Task (or group) name -> ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr`` or whatever
        metrics the task has, as shares (not percent), and ``n``, the number of items.

    Raises:
        MissingInput: a task file, ``include_path`` or a task's data file is not there.
        ParameterError: no task, an unknown name, limit or batch_size below 1.
        NoNetwork: a task's data set is on a hub that cannot be reached.
    """
    if not tasks or batch_size < 1 or (limit is not None and limit < 1):
        raise ParameterError(
            f"Asked for tasks {list(tasks)} with limit {limit}, batch size {batch_size}",
            "There is at least one task, and limit and batch size are at least 1",
            "Name a task or task file, or raise the number (limit: null means all items)",
        )
    from lm_eval import evaluator  # imported here: two seconds that other commands need not wait
    from lm_eval.models.huggingface import HFLM

    training = model.training
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_random_state(seed))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ffprune-tasks-")))
        stack.callback(model.train, training)
        loaded = _load(tasks, include_path, scratch, seed)
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        # evaluate, not simple_evaluate: the latter only adds seeds (set here) and a description of the
        # machine that runs pip and git, seven seconds per call.
        results = evaluator.evaluate(
            harness,
            loaded,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            confirm_run_unsafe_code=False,
        )
    return {name: _metrics(rows, results["n-samples"].get(name)) for name, rows in results["results"].items()}


def build_cloze_task(
    articles: str | Sequence[str],
    folder: Path,
    items: int = 40,
    seed: int = 0,
) -> Path:
    """Write the project's own task: which of four sentences comes next?

    An item is up to 160 characters of consecutive sentences of a paragraph, the true next sentence (40 to
    100 characters), and three sentences from other paragraphs of the text, of nearly the same length. No
    sentence is the answer of two items. Chance is 25%.

    Args:
        articles: the test split, one text per article, or one text as a whole.
        folder: where ``wiki_continuation.yaml`` and ``.jsonl`` are written; made if missing.
        items: number of items.
        seed: of the choice of items, distractors and their order; the same files for the same seed and text.

    Returns:
        The path of the task file, to be given to :func:`evaluate_tasks`.

    Raises:
        ParameterError: items below 1.
        TooLittleText: the text has fewer items.
    """
    if items < 1:
        raise ParameterError(f"Asked for a task of {items} items", "A task has at least 1", "Raise the number of items")
    paragraphs = _paragraphs(articles if isinstance(articles, str) else "\n".join(articles))
    candidates = _candidates(paragraphs)
    usable = {sentence for sentences in paragraphs for sentence in sentences if _usable(sentence)}
    pool = sorted(usable, key=lambda s: (len(s), s))
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in generator.sample(range(len(candidates)), len(candidates)):
        if len(rows) == items:
            break
        candidate = candidates[number]
        if wrong := _distractors(candidate, pool, generator):
            choices = [candidate.gold, *wrong]
            generator.shuffle(choices)
            rows.append({"context": candidate.context, "choices": choices, "gold": choices.index(candidate.gold)})
    if len(rows) < items:
        raise TooLittleText(
            f"Asked for a {CLOZE_TASK} task of {items} items",
            f"The text gives at most {len(rows)}",
            f"Ask for at most {len(rows)} items, or give more text",
        )
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    _write(folder / f"{CLOZE_TASK}.jsonl", "".join(lines))
    _write(folder / f"{CLOZE_TASK}.yaml", _TASK)
    return folder / f"{CLOZE_TASK}.yaml"


# --- tasks -----------------------------------------------------------------------------------------------


def _load(tasks: Sequence[str], include_path: Path | None, scratch: Path, seed: int) -> Any:
    """lm-eval's dictionary of loaded tasks."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise MissingInput(f"Asked for tasks from {include_path}", "There is no such folder", "Correct include_path")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    names = [task for task in tasks if not _is_path(task)]
    if any(name not in manager.task_index for name in names):
        local = list(manager.all_tasks)
        manager = TaskManager(include_path=include_path, include_defaults=True)
        _check_names(names, local, manager.all_tasks)
    specs = [
        _spec(manager.task_index[task].yaml_path, scratch, task)
        if task in manager.task_index
        else _spec(_task_file(task), scratch, task)
        for task in tasks
    ]
    try:
        loaded = manager.load(specs)
    except (ConnectionError, FileNotFoundError) as error:
        raise _unreachable(error, tasks) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _task_file(task: str) -> Path:
    path = Path(task)
    if not path.is_file():
        nearby = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise MissingInput(
            f"Asked for the task file {task}",
            f"There is no such file; task files in that folder: {', '.join(nearby) or 'none'}",
            "Correct the path, or run the stage that writes the file",
        )
    return path


def _check_names(names: Sequence[str], local: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5)
            raise ParameterError(
                f"Asked for the task {name!r}, which is unknown",
                f"Local tasks: {', '.join(local) or 'none'}; nearest of lm-eval's {len(known):,}: "
                f"{', '.join(near) or 'none'}",
                "Correct the name, give the path of a task file, or set include_path to its folder",
            )


def _spec(path: Path | None, scratch: Path, task: str) -> str | dict[str, Any]:
    """What the task manager is given: the task file's content with its data found, or a name as it is."""
    if path is None:
        return task
    from lm_eval.tasks._yaml_loader import load_yaml  # the loader that knows lm-eval's includes and functions

    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    plain = isinstance(config.get("task"), str) and "class" not in config and "group" not in config
    if not plain or config.get("dataset_path") not in _LOCAL_FORMATS:
        return task
    keywords = dict(config.get("dataset_kwargs") or {})
    files = _find_data(keywords.get("data_files"), path.parent, task)
    config["dataset_kwargs"] = {**keywords, "data_files": files, "cache_dir": str(scratch)}
    return config


def _find_data(files: Any, folder: Path, task: str) -> Any:
    """Absolute paths for a ``data_files`` entry: a path, or a list or dict of them."""
    if isinstance(files, dict):
        return {split: _find_data(inner, folder, task) for split, inner in files.items()}
    if isinstance(files, list):
        return [_find_data(inner, folder, task) for inner in files]
    if not isinstance(files, str) or "://" in files or any(mark in files for mark in "*?["):
        return files
    for path in (folder / files, Path(files)):
        if path.is_file():
            return str(path.resolve())
    raise MissingInput(
        f"The task {task} reads {files}",
        f"There is no such file in {folder.resolve()} nor in the working directory",
        "Correct data_files in the task file, or put the file there",
    )


def _unreachable(error: Exception, tasks: Sequence[str]) -> NoNetwork:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return NoNetwork(
        f"Asked for tasks {', '.join(tasks)}, one of which loads its data set from a hub",
        f"The data set could not be had: {reason}",
        "Connect to the hub, or use a local task file whose dataset_path is json, csv or parquet",
    )


def _metrics(rows: dict[str, Any], samples: dict[str, int] | None) -> dict[str, float]:
    """``acc,none`` -> ``acc`` and ``acc_stderr,none`` -> ``acc_stderr``; other filters keep their name."""
    named = {
        key.removesuffix(",none"): float(value)
        for key, value in rows.items()
        if "," in key and isinstance(value, int | float)
    }
    return named if samples is None else {**named, "n": samples["effective"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval, data set and tokenizer chatter; errors still surface as exceptions."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed the global generators; give them their state back afterwards."""
    state, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what tasks use)
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(legacy)  # noqa: NPY002


# --- the project's own task ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    context: str
    gold: str
    paragraph: frozenset[str]


def _paragraphs(text: str) -> list[list[str]]:
    """The sentences of every line that has some."""
    lines = ([part.strip() for part in _SENTENCE_END.split(line.strip())] for line in text.splitlines())
    return [sentences for sentences in lines if any(sentences)]


def _usable(sentence: str) -> bool:
    return len(sentence) in _SENTENCE_CHARACTERS and sentence[0].isupper() and sentence[-1] in ".!?"


def _candidates(paragraphs: Sequence[Sequence[str]]) -> list[_Candidate]:
    """Every usable sentence that has a sentence before it, in the order of the text, without repetitions."""
    found: dict[str, _Candidate] = {}
    for sentences in paragraphs:
        for place in range(1, len(sentences)):
            first = place
            while first and len(" ".join(sentences[first - 1 : place])) <= _CONTEXT_CHARACTERS:
                first -= 1
            if first < place and _usable(gold := sentences[place]):
                context = " ".join(sentences[first:place])
                found.setdefault(gold, _Candidate(context, gold, frozenset(sentences)))
    return list(found.values())


def _distractors(candidate: _Candidate, pool: Sequence[str], generator: random.Random) -> list[str]:
    """Three sentences of other paragraphs within 10% of the answer's length, or of the nearest lengths.

    ``pool`` is sorted by length. Empty if there are not three.
    """
    length = len(candidate.gold)
    low, high = (bisect.bisect_left(pool, length * share, key=len) for share in (0.9, 1.1))
    near = [sentence for sentence in pool[low:high] if sentence not in candidate.paragraph]
    if len(near) < _NEAREST:
        others = [sentence for sentence in pool if sentence not in candidate.paragraph]
        near = sorted(others, key=lambda s: abs(len(s) - length))[:_NEAREST]
    return generator.sample(near, _CHOICES - 1) if len(near) >= _CHOICES - 1 else []


def _write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
