"""Documents of lm-eval's stock tasks from local files instead of the hub, refused before a model answers any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffprune.core.errors import ParameterError

SPLITS = ("train", "validation", "test")
"""What a file's name may say that it has."""


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of one task, and says all there is to say of it."""
    return isinstance(config.get("task"), str) and "class" not in config and "group" not in config


def splits_of(task: str, data: Path) -> dict[str, Path]:
    """The files of a task by split: ``TASK_SPLIT.jsonl``, with anything between split and ending."""
    found: dict[str, Path] = {}
    for path in sorted(data.glob("*.jsonl")):
        for split in SPLITS:
            if not path.name.startswith(f"{task}_{split}"):
                continue
            if split in found:
                raise ParameterError(
                    f"Asked for the task {task}, whose {split} split is in both {found[split]} and {path}",
                    "A split is one file",
                    "Remove or rename one of the two",
                )
            found[split] = path
    return found


def from_files(manager: Any, path: Path | None, task: str, files: Mapping[str, Path], scratch: Path) -> Any:
    """A stock task, loaded with documents from files and none from the hub."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=True) if path is not None else {}
    asked = _asked(task, files.values())
    if not is_plain(config):
        raise ParameterError(
            asked,
            f"{task} is a group, a tag or a Python class, which alone knows where its documents are",
            f"Ask for the single tasks of a group or tag, with a file each; or remove {_names(files.values())}",
        )
    if not {"validation", "test"} & set(files):
        raise ParameterError(
            asked, "Questions are taken from test or validation", f"Add {task}_test.jsonl or {task}_validation.jsonl"
        )
    fewshot = config.get("fewshot_split") if config.get("fewshot_split") in files else None
    examples = fewshot or "train" in files or "samples" in (config.get("fewshot_config") or {})
    if config.get("num_fewshot") and not examples:
        # lm-eval would take them from the questions themselves, and so show a question with its answer.
        raise ParameterError(
            asked,
            f"{task} shows {config['num_fewshot']} examples before every question, and none of these files has them",
            f"Add {task}_{config.get('fewshot_split') or 'train'}.jsonl",
        )
    fields = {split: _fields(file) for split, file in files.items()}
    config.pop("custom_dataset", None)  # a function that would make documents, whatever dataset_path says
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file.resolve()) for split, file in files.items()},
            "cache_dir": str(scratch),
        },
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
        "fewshot_split": fewshot,
    }
    try:
        return manager.load([config])["tasks"][task]
    except Exception as error:  # templates, tasks' own functions and the reader of files raise what they like
        given = ", ".join(fields.get("test") or fields["validation"])
        raise _cannot_ask(asked, f"Documents with the fields {given}", error) from error


def _fields(path: Path) -> list[str]:
    """The fields of the documents in a file of JSON Lines, which are the same in every one."""
    fields: list[str] = []
    first = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                document = error
            if not isinstance(document, dict):
                raise ParameterError(
                    f"Asked for documents from {path}",
                    f"Line {number} is not a JSON object"
                    + (f": {document}" if isinstance(document, ValueError) else ""),
                    "Write one document a line, {...}",
                )
            fields, first = (fields, first) if first else (list(document), number)
            # A document without a field would get an empty one, and be asked all the same.
            if differing := set(document) ^ set(fields):
                raise ParameterError(
                    f"Asked for documents from {path}",
                    f"Of lines {first} and {number} only one has {', '.join(sorted(differing))}",
                    "Give every document the same fields, null where there is nothing to say",
                )
    if not first:
        raise ParameterError(
            f"Asked for documents from {path}", "It has none", "Write one document a line, or remove it"
        )
    return fields


def check_documents(task: Any, numbers: Sequence[int] | None, files: Mapping[str, Path]) -> None:
    """Refuse documents that cannot be asked before the model answers any: those drawn, or all."""
    documents = task.eval_docs
    path = files.get("test") or files["validation"]
    for number in range(len(documents)) if numbers is None else numbers:
        try:
            _ask(task, documents[number])
        except Exception as error:  # see from_files
            what = f"Document {number + 1} of {path.name}"
            raise _cannot_ask(_asked(task.task_name, files.values()), what, error) from error


def _ask(task: Any, document: Mapping[str, Any]) -> None:
    """Make a question of a document as lm-eval does.

    Raises:
        ValueError: the answer is none of the choices; lm-eval would count it as wrong, whatever the model says.
        Exception: whatever a template or a task's own function raises.
    """
    text, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.config.doc_to_choice is None:
        return
    choices = task.doc_to_choice(document)
    answer = text if task.multiple_input else target
    if task.OUTPUT_TYPE == "multiple_choice" and task.config.process_results is None:
        for gold in answer if isinstance(answer, list) else [answer]:
            if gold not in (choices if isinstance(gold, str) else range(len(choices))):
                raise ValueError(f"the answer {gold!r} is none of {choices}")


def _asked(task: str, files: Iterable[Path]) -> str:
    return f"Asked for the task {task} with documents from {_names(files)}"


def _names(files: Iterable[Path]) -> str:
    return " and ".join(map(str, files))


def _cannot_ask(asked: str, what: str, error: Exception) -> ParameterError:
    cause = error.__cause__ or error  # datasets says only that there was an error, and what it was behind that
    reason = " ".join(str(cause).split())
    return ParameterError(
        asked,
        f"{what} cannot be asked: {type(cause).__name__}: {reason[:300]}",
        "Give documents the fields and kinds of values that the task's data set has on the hub",
    )
