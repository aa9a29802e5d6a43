"""Zero-shot tasks through lm-evaluation-harness (METHODS 8)."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffprune.core.errors import MissingInput, NoNetwork, ParameterError
from ffprune.evaluate.documents import SPLITS, check_documents, from_files, is_plain, splits_of

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
    data: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy on tasks, by lm-eval's own model wrapper, task loader and evaluator.

    Log-softmax is taken in float32 whatever the model's dtype. lm-eval's own prints, logs and bars are
    silenced, and the state of the global random generators is put back. No chat template is applied.

    Args:
        model: a causal language model; put into eval mode while it runs, then back.
        tokenizer: its tokenizer; not changed.
        tasks: names of tasks, groups or tags, or paths of task files (``*.yaml``). A task file's relative
            ``data_files`` are looked for next to that file. Names are looked up in ``include_path`` first;
            lm-eval's stock tasks, which need ``data`` or the hub, are indexed (10 s or more) only for names not
            found there. Task files may name Python functions, which run: use files you trust.
        include_path: folder with task files, searched for names.
        limit: items of every task (of a group, of every task in it), drawn at random by ``seed`` alone, so that
            every model is asked the same ones; None for all.
        batch_size: sequences per forward pass.
        seed: of the draw of items and of every random generator that tasks use.
        data: folder with documents of stock tasks, ``TASK_SPLIT.jsonl`` or ``TASK_SPLIT*.jsonl`` with a split train,
            validation or test: a JSON object a line, fields as on the hub. A stock task that is asked by its own
            name (not through a group or tag) and has a file here reads nothing else; one without goes to the hub.
        progress: told of requests answered and in all; an item is as many requests as it has choices.

    Returns:
        Task (or group) name -> ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr`` or whatever
        metrics the task has, as shares (not percent), and ``n``, the number of items.

    Raises:
        MissingInput: a task file, ``include_path``, ``data`` or a task's data file is not there.
        ParameterError: no task, an unknown name, limit or batch_size below 1; in ``data``, two files for a split, a
            file that is not JSON Lines, or documents that the task cannot ask.
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
        loaded, files = _load(tasks, include_path, data, scratch, seed)
        drawn = _draw(loaded["tasks"], limit, seed)
        for name, splits in files.items():
            check_documents(loaded["tasks"][name], drawn.get(name), splits)
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        if progress is not None:
            _watch(harness, progress)
        # evaluate, not simple_evaluate: the latter only adds seeds (set here) and a description of the
        # machine that runs pip and git, seven seconds per call.
        results = evaluator.evaluate(
            harness,
            loaded,
            samples=drawn,
            bootstrap_iters=1000,
            log_samples=False,
            confirm_run_unsafe_code=False,
        )
    return {name: _metrics(rows, results["n-samples"].get(name)) for name, rows in results["results"].items()}


def _watch(harness: Any, progress: Callable[[int, int], None]) -> None:
    """Have the answers of lm-eval's model counted, through the hook by which it offers each to a cache."""
    asked = answered = 0

    class Counting:
        def add_partial(self, kind: str, request: object, answer: object) -> None:
            nonlocal answered
            answered += 1
            progress(answered, asked)

    def counting(answer: Callable[..., Any]) -> Callable[..., Any]:
        def answer_all(requests: Sequence[Any], *rest: Any, **options: Any) -> Any:
            nonlocal asked
            asked += len(requests)
            return answer(requests, *rest, **options)

        return answer_all

    harness.set_cache_hook(Counting())
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(harness, kind, counting(getattr(harness, kind)))


# --- tasks -----------------------------------------------------------------------------------------------


def _load(
    tasks: Sequence[str], include_path: Path | None, data: Path | None, scratch: Path, seed: int
) -> tuple[Any, dict[str, dict[str, Path]]]:
    """lm-eval's dictionary of loaded tasks, and the files by split of stock tasks that read some."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise MissingInput(f"Asked for tasks from {include_path}", "There is no such folder", "Correct include_path")
    if data is not None and not data.is_dir():
        raise MissingInput(
            f"Asked for documents of tasks from {data}",
            "There is no such folder",
            "Correct the path, or make the folder (it may be empty)",
        )
    manager = TaskManager(include_path=include_path, include_defaults=False)
    names = [task for task in tasks if not _is_path(task)]
    local = list(manager.all_tasks)
    if any(name not in local for name in names):
        manager = TaskManager(include_path=include_path, include_defaults=True)
        _check_names(names, local, manager.all_tasks)
    stock = [name for name in names if name not in local]
    files = {name: splits for name in stock if data is not None and (splits := splits_of(name, data))}
    specs: list[Any] = []
    for task in tasks:
        path = manager.task_index[task].yaml_path if task in manager.task_index else _task_file(task)
        found = files.get(task)
        specs.append(from_files(manager, path, task, found, scratch) if found else _spec(path, scratch, task))
    try:
        loaded = manager.load(specs)
    except (ConnectionError, FileNotFoundError) as error:
        raise _unreachable(error, tasks) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded, files


def _draw(tasks: Mapping[str, Any], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the items to ask, of every task that has more than ``limit``; of others lm-eval asks all."""
    if limit is None:
        return {}
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    # A generator for every task: what is drawn of one does not depend on the others asked with it.
    return {
        name: sorted(random.Random(seed).sample(range(size), limit)) for name, size in sizes.items() if size > limit
    }


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
    if not is_plain(config) or config.get("dataset_path") not in _LOCAL_FORMATS:
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
        "Connect to the hub, put the task's documents into the folder `data` as TASK_SPLIT.jsonl (SPLIT: "
        f"{', '.join(SPLITS)}), or use a local task file whose dataset_path is json, csv or parquet",
    )


# --- results ---------------------------------------------------------------------------------------------


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
