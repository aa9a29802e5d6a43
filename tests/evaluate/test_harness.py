"""lm-eval's real harness on tiny models: the project's own task, and stock tasks with made-up documents."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ffprune.core.errors import MissingInput, NoNetwork, ParameterError
from ffprune.evaluate.cloze import CLOZE_TASK, build_cloze_task
from ffprune.evaluate.harness import evaluate_tasks
from tests.evaluate.test_cloze import ARTICLES, rows
from tests.tiny import opt, spread

SHARED = Path(__file__).parents[3] / "shared" / "data"
#: Folders of lm-eval's tasks that are indexed here; all of them take 10 s.
STOCK = ("arc", "gsm8k", "hellaswag", "super_glue/boolq", "winogrande")
HOLES = [
    {"sentence": f"The {a} fell on the {b} and the _ broke.", "option1": a, "option2": b, "answer": str(1 + i % 2)}
    for i, (a, b) in enumerate(itertools.permutations(("cup", "jar", "vase", "plate"), 2))
]


def science(number: int) -> dict[str, Any]:
    """A document of ARC; the real ones also number their choices 1 to 4, or have three or five."""
    words = [f"answer {number}{letter}" for letter in "abcd"][: 3 + number % 2]
    labels = list("ABCD" if number % 3 else "1234")[: len(words)]
    return {
        "id": f"made up {number}",
        "question": f"Which is number {number}?",
        "choices": {"text": words, "label": labels},
        "answerKey": labels[number % len(labels)],
    }


SCIENCE = [science(number) for number in range(12)]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock tasks of a few folders, and no hub."""
    import datasets
    from lm_eval import tasks

    manager, load = tasks.TaskManager, datasets.load_dataset
    folders = [Path(tasks.__file__).parent / name for name in STOCK]

    def few(include_path: Path | None, include_defaults: bool) -> Any:
        own = [] if include_path is None else [include_path]
        return manager(include_path=[*folders, *own] if include_defaults else own, include_defaults=False)

    def local(path: str, *given: Any, **more: Any) -> Any:
        if path != "json":
            raise ConnectionError(f"no hub in tests: {path}")
        return load(path, *given, **more)

    monkeypatch.setattr(tasks, "TaskManager", few)
    monkeypatch.setattr(datasets, "load_dataset", local)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[int]]]:
    """What every call gives lm-eval as the items to ask."""
    from lm_eval import evaluator

    seen: list[dict[str, list[int]]] = []
    evaluate = evaluator.evaluate

    def spy(*given: Any, **more: Any) -> Any:
        seen.append(more["samples"])
        return evaluate(*given, **more)

    monkeypatch.setattr(evaluator, "evaluate", spy)
    return seen


def put(folder: Path, **files: Iterable[object]) -> Path:
    """A folder with a file of JSON Lines for every keyword; texts are written as they are."""
    folder.mkdir(exist_ok=True)
    for name, documents in files.items():
        lines = (row if isinstance(row, str) else json.dumps(row) for row in documents)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.slow
def test_own_task_by_path_and_by_name(
    small_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    task = build_cloze_task(ARTICLES, tmp_path, items=12)
    small_llama.train()
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    told: list[tuple[int, int]] = []
    by_path = evaluate_tasks(small_llama, tokenizer, [str(task)], progress=lambda *count: told.append(count))
    assert (random.random(), torch.rand(1)) == expected  # the caller's random state is untouched
    assert small_llama.training and tokenizer.pad_token is None
    by_name = evaluate_tasks(small_llama, tokenizer, [CLOZE_TASK], include_path=tmp_path, batch_size=3)
    assert by_path == by_name
    scores = by_path[CLOZE_TASK]
    assert set(scores) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    assert scores["n"] == 12
    requests = sum(len(row["choices"]) for row in rows(task))
    assert told == [(number, requests) for number in range(1, requests + 1)]
    assert capfd.readouterr() == ("", "")
    # The slow twin: whole logits, one choice at a time, float64.
    twin = small_llama.double().eval()
    right = sum(best_choice(twin, tokenizer, row) == row["gold"] for row in rows(task))
    assert scores["acc"] == pytest.approx(right / 12)


def best_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> int:
    scores = [score(model, tokenizer, row["context"], choice) for choice in row["choices"]]
    return max(range(len(scores)), key=scores.__getitem__)


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    """Log-probability of a choice after its context."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor(tokenizer(f"{context} {choice}")["input_ids"])
    with torch.no_grad():
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return float(logp[start - 1 : -1].gather(1, ids[start:, None]).sum())


def test_limit_draws_items_by_the_seed_and_the_same_for_every_model(
    small_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    drawn: list[dict[str, list[int]]],
) -> None:
    task = str(build_cloze_task(ARTICLES, tmp_path, items=12))
    assert evaluate_tasks(small_llama, tokenizer, [task], limit=5)[CLOZE_TASK]["n"] == 5
    evaluate_tasks(spread(opt()), tokenizer, [task], limit=5)
    evaluate_tasks(small_llama, tokenizer, [task], limit=5, seed=1)
    first, again, other = (call[CLOZE_TASK] for call in drawn)
    assert first == again != other
    assert first == sorted(set(first)) != list(range(5))
    assert set(first) < set(range(12))
    for enough in (12, 13, None):
        assert evaluate_tasks(small_llama, tokenizer, [task], limit=enough)[CLOZE_TASK]["n"] == 12


def test_the_items_that_were_drawn_are_the_items_that_count(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, drawn: list[dict[str, list[int]]]
) -> None:
    task = build_cloze_task(ARTICLES, tmp_path, items=12)
    found = [
        evaluate_tasks(small_llama, tokenizer, [str(task)], limit=1, seed=seed)[CLOZE_TASK]["acc"] for seed in range(6)
    ]
    twin = small_llama.double().eval()
    items = rows(task)
    numbers = [call[CLOZE_TASK][0] for call in drawn]
    assert found == [best_choice(twin, tokenizer, items[n]) == items[n]["gold"] for n in numbers]
    assert len(set(numbers)) > 1


def test_a_limit_is_that_of_every_task_in_a_group(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = put(tmp_path, one=SCIENCE, two=SCIENCE[:3])
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(ARC % (name, data / f"{name}.jsonl"))
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    found = evaluate_tasks(small_llama, tokenizer, ["both"], include_path=tmp_path, limit=4)
    assert {name: found[name]["n"] for name in ("one", "two")} == {"one": 4, "two": 3}


def test_missing_files_are_named(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = build_cloze_task(ARTICLES, tmp_path, items=4)
    with pytest.raises(MissingInput, match=rf"nothing.yaml.*{CLOZE_TASK}.yaml"):
        evaluate_tasks(small_llama, tokenizer, [str(tmp_path / "nothing.yaml")])
    with pytest.raises(MissingInput, match="no such folder"):
        evaluate_tasks(small_llama, tokenizer, [CLOZE_TASK], include_path=tmp_path / "nowhere")
    task.with_suffix(".jsonl").unlink()
    with pytest.raises(MissingInput, match=f"{CLOZE_TASK}.jsonl"):
        evaluate_tasks(small_llama, tokenizer, [str(task)])


def test_unknown_name_lists_what_is_there(
    small_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.tasks import TaskManager

    def without_defaults(include_path: Path, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)  # indexing takes 10 s

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    build_cloze_task(ARTICLES, tmp_path, items=4)
    with pytest.raises(ParameterError, match=rf"'wiki_continuatoin'.*Local tasks: {CLOZE_TASK}"):
        evaluate_tasks(small_llama, tokenizer, ["wiki_continuatoin"], include_path=tmp_path)


@pytest.mark.parametrize("arguments", [{"tasks": []}, {"tasks": ["a"], "limit": 0}, {"tasks": ["a"], "batch_size": 0}])
def test_senseless_numbers(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError):
        evaluate_tasks(small_llama, tokenizer, **arguments)


ARC = """\
task: %s
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_stock_tasks_read_their_documents_from_a_folder(
    stock: None, small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = put(tmp_path / "data", arc_easy_test=SCIENCE, arc_easy_validation=SCIENCE[:2], winogrande_validation_x=HOLES)
    # Names that only look alike belong to other tasks, or to none.
    put(data, arc_easy=["{"], arc_challenge_test=["{"], my_arc_easy_test=["{"], winogrande_xl_validation=["{"])
    found = evaluate_tasks(small_llama, tokenizer, ["arc_easy", "winogrande"], data=data)
    assert {name: scores["n"] for name, scores in found.items()} == {"arc_easy": 12, "winogrande": len(HOLES)}
    # The twin: the task written down, as anyone could.
    own = tmp_path / "own.yaml"
    own.write_text(ARC % ("own", data / "arc_easy_test.jsonl"))
    assert evaluate_tasks(small_llama, tokenizer, [str(own)])["own"] == found["arc_easy"]
    twin = small_llama.double().eval()
    sums = torch.tensor(
        [
            [score(twin, tokenizer, before + hole[option], after.strip()) for option in ("option1", "option2")]
            for hole in HOLES
            for before, _, after in [hole["sentence"].partition("_")]
        ]
    )
    gold = torch.tensor([int(hole["answer"]) - 1 for hole in HOLES])
    assert found["winogrande"]["acc"] == pytest.approx(float((sums.argmax(1) == gold).double().mean()))


def test_a_task_that_makes_questions_of_its_documents(
    stock: None, small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    endings = ["falls.", "sings.", "eats it.", "reads a book about it."]
    documents = [
        {"activity_label": "Walking", "ctx_a": f"A man {i} walks.", "ctx_b": "he", "endings": endings, "label": "1"}
        for i in range(4)
    ]
    data = put(tmp_path, hellaswag_validation_first4=documents)
    assert evaluate_tasks(small_llama, tokenizer, ["hellaswag"], data=data, limit=3)["hellaswag"]["n"] == 3
    put(data, hellaswag_validation_first4=[{**row, "label": ""} for row in documents])
    with pytest.raises(
        ParameterError, match=r"task hellaswag with documents from .*invalid literal for int.*on the hub"
    ):
        evaluate_tasks(small_llama, tokenizer, ["hellaswag"], data=data)


def test_a_task_without_a_file_goes_to_the_hub(
    stock: None, small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = put(tmp_path / "data", arc_easy_test=SCIENCE)
    for folder, task in ((data, "arc_challenge"), (None, "arc_easy")):
        with pytest.raises(NoNetwork, match=r"no hub in tests: allenai/ai2_arc.*TASK_SPLIT\.jsonl"):
            evaluate_tasks(small_llama, tokenizer, [task], data=folder)
    # A task file of one's own says itself what it reads, though it bears the name of a stock task.
    own = tmp_path / "own"
    own.mkdir()
    (own / "arc_easy.yaml").write_text(ARC % ("arc_easy", data / "two.jsonl"))
    put(data, two=SCIENCE[:2])
    found = evaluate_tasks(small_llama, tokenizer, ["arc_easy"], include_path=own, data=data)
    assert found["arc_easy"]["n"] == 2


def test_a_folder_of_documents_that_is_not_there(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(MissingInput, match=r"documents of tasks from .*nowhere.*no such folder"):
        evaluate_tasks(small_llama, tokenizer, ["arc_easy"], data=tmp_path / "nowhere")


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in SCIENCE[1].items() if name != field}


QUESTION = {"passage": "Tea is hot.", "question": "is tea hot"}


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        (
            "arc_easy",
            {"arc_easy_test": SCIENCE, "arc_easy_test_2": SCIENCE},
            r"test\.jsonl and .*test_2\.jsonl.*one file",
        ),
        (
            "arc_easy",
            {"arc_easy_test": [SCIENCE[0], '{"id": 1, ']},
            r"arc_easy_test\.jsonl.*Line 2 is not a JSON object: ",
        ),
        ("arc_easy", {"arc_easy_test": ["[1, 2]"]}, "Line 1 is not a JSON object"),
        ("arc_easy", {"arc_easy_test": ["", " "]}, "It has none"),
        ("arc_easy", {"arc_easy_test": [*SCIENCE, "", without("answerKey")]}, "lines 1 and 14 only one has answerKey"),
        (
            "arc_easy",
            {"arc_easy_test": [without("question")] * 2},
            "fields id, choices, answerKey .*'question' is undef",
        ),
        ("arc_easy", {"arc_easy_test": [*SCIENCE, {**SCIENCE[1], "answerKey": "E"}]}, "Document 13 of arc_easy_test"),
        ("arc_easy", {"arc_easy_test": [*SCIENCE, {**SCIENCE[1], "choices": {}}]}, "Document 13 of arc_easy_test"),
        (
            "arc_easy",
            {"arc_easy_test": [*SCIENCE, {**SCIENCE[1], "choices": 7}]},
            "Document 13 .*has no attribute 'label'",
        ),
        ("arc_easy", {"arc_easy_train": SCIENCE}, r"test or validation\. Add arc_easy_test\.jsonl or arc_easy_valid"),
        ("boolq", {"boolq_validation": [{**QUESTION, "label": "1"}]}, r"answer '1' is none of \['no', 'yes'\]"),
        ("boolq", {"boolq_validation": [{**QUESTION, "label": -1}]}, "answer -1 is none of"),
        ("ai2_arc", {"ai2_arc_test": SCIENCE}, r"a group, a tag or a Python class.*remove .*ai2_arc_test\.jsonl"),
        ("gsm8k", {"gsm8k_test": [{"question": "1 + 1", "answer": "#### 2"}]}, r"5 examples.*Add gsm8k_train\.jsonl"),
    ],
)
def test_documents_that_cannot_be_asked_are_refused(
    stock: None,
    small_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    files: dict[str, list[Any]],
    message: str,
) -> None:
    monkeypatch.setattr(small_llama, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(ParameterError, match=message):
        evaluate_tasks(small_llama, tokenizer, [task], data=put(tmp_path, **files))


@pytest.mark.parametrize("label", [1, True])
def test_yes_and_no_are_numbers_or_truths(
    stock: None, small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, label: object
) -> None:
    data = put(tmp_path, boolq_validation=[{**QUESTION, "label": label}, {**QUESTION, "label": type(label)(0)}])
    scores = evaluate_tasks(small_llama, tokenizer, ["boolq"], data=data)["boolq"]
    assert scores["acc"] == 0.5  # the same question, once with each answer


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data, with the zero-shot sets, is not there")
def test_stock_tasks_from_real_files(small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tasks = ["arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande"]
    found = evaluate_tasks(small_llama, tokenizer, tasks, data=SHARED, limit=3)
    assert {name: scores["n"] for name, scores in found.items()} == dict.fromkeys(tasks, 3)
    assert all(0 <= scores["acc"] <= 1 for scores in found.values())
