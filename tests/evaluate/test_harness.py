"""lm-eval's real harness on tiny models, and the project's own task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ffprune.core.errors import MissingInput, ParameterError, TooLittleText
from ffprune.evaluate.harness import CLOZE_TASK, build_cloze_task, evaluate_tasks

SHARED = Path(__file__).parents[3] / "shared" / "data"


def article(seed: int, paragraphs: int = 4) -> str:
    words = [
        "amber",
        "basin",
        "cedar",
        "delta",
        "ember",
        "fjord",
        "grove",
        "haven",
        "islet",
        "jetty",
        "knoll",
    ]
    generator = random.Random(seed)
    lines = ["Title without a full stop"]
    for _ in range(paragraphs):
        sentences = (
            " ".join(generator.choices(words, k=generator.randint(8, 15))).capitalize() + "." for _ in range(5)
        )
        lines.append(" ".join(sentences))
    return "\n\n".join(lines)


ARTICLES = [article(seed) for seed in range(5)]


def rows(task: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in task.with_suffix(".jsonl").read_text().splitlines()]


def test_items_are_true_continuations_among_strangers(tmp_path: Path) -> None:
    task = build_cloze_task(ARTICLES, tmp_path / "new", items=30, seed=3)
    items = rows(task)
    assert task == tmp_path / "new" / f"{CLOZE_TASK}.yaml"
    assert len(items) == len({row["choices"][row["gold"]] for row in items}) == 30
    assert {row["gold"] for row in items} == {0, 1, 2, 3}
    text = "\n".join(ARTICLES)
    for row in items:
        gold = row["choices"][row["gold"]]
        assert row["context"] + " " + gold in text
        assert len(row["context"]) <= 160
        assert len(set(row["choices"])) == 4
        (home,) = [line for line in text.splitlines() if row["context"] + " " + gold in line]
        for choice in row["choices"]:
            assert 40 <= len(choice) <= 100
            assert choice in text and (choice == gold or choice not in home)


def test_same_seed_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_cloze_task(ARTICLES, tmp_path / name, items=20, seed=seed)
    a, b, c = ((tmp_path / name / f"{CLOZE_TASK}.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        f"{CLOZE_TASK}.jsonl",
        f"{CLOZE_TASK}.yaml",
    ]


def test_the_task_file_names_no_place(tmp_path: Path) -> None:
    task = build_cloze_task("\n".join(ARTICLES), tmp_path, items=4)
    assert str(tmp_path) not in task.read_text()


def test_too_little_text_for_a_task(tmp_path: Path) -> None:
    with pytest.raises(TooLittleText, match=r"5000 items.*gives at most \d+"):
        build_cloze_task(ARTICLES, tmp_path / "out", items=5000)
    with pytest.raises(TooLittleText, match="at most 0"):
        build_cloze_task("One sentence only.", tmp_path / "out", items=1)
    with pytest.raises(ParameterError):
        build_cloze_task(ARTICLES, tmp_path / "out", items=0)
    assert not (tmp_path / "out").exists()


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
    by_path = evaluate_tasks(small_llama, tokenizer, [str(task)])
    assert (random.random(), torch.rand(1)) == expected  # the caller's random state is untouched
    assert small_llama.training and tokenizer.pad_token is None
    by_name = evaluate_tasks(small_llama, tokenizer, [CLOZE_TASK], include_path=tmp_path, batch_size=3)
    assert by_path == by_name
    scores = by_path[CLOZE_TASK]
    assert set(scores) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    assert scores["n"] == 12
    assert capfd.readouterr() == ("", "")
    # The slow twin: whole logits, one choice at a time, float64.
    twin = small_llama.double().eval()
    right = sum(best_choice(twin, tokenizer, row) == row["gold"] for row in rows(task))
    assert scores["acc"] == pytest.approx(right / 12)


def best_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> int:
    scores = []
    start = len(tokenizer(row["context"])["input_ids"])
    for choice in row["choices"]:
        ids = torch.tensor(tokenizer(row["context"] + " " + choice)["input_ids"])
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        scores.append(float(logp[start - 1 : -1].gather(1, ids[start:, None]).sum()))
    return max(range(len(scores)), key=scores.__getitem__)


def test_limit_takes_the_first_items(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = build_cloze_task(ARTICLES, tmp_path, items=12)
    assert evaluate_tasks(small_llama, tokenizer, [str(task)], limit=5)[CLOZE_TASK]["n"] == 5


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
task: local_arc_easy
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data, with the zero-shot sets, is not there")
def test_zero_shot_set_from_a_local_file(
    small_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = tmp_path / "local_arc_easy.yaml"
    task.write_text(ARC % (SHARED / "arc_easy_test.jsonl"))
    scores = evaluate_tasks(small_llama, tokenizer, [str(task)], limit=20)["local_arc_easy"]
    assert scores["n"] == 20
    assert 0 <= scores["acc"] <= 1 and 0 <= scores["acc_norm"] <= 1
