"""The project's own task, as files; tests/evaluate/test_harness.py asks it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ffprune.core.errors import ParameterError, TooLittleText
from ffprune.evaluate.cloze import CLOZE_TASK, build_cloze_task


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


def test_text_in_wikitexts_tokens_has_as_many_sentences(tmp_path: Path) -> None:
    spaced = [text.replace(".", " .") for text in ARTICLES]
    for folder, articles in (("plain", ARTICLES), ("spaced", spaced)):
        build_cloze_task(articles, tmp_path / folder, items=10)
    plain, tokens = ((tmp_path / name / f"{CLOZE_TASK}.jsonl").read_text() for name in ("plain", "spaced"))
    assert len(tokens.splitlines()) == len(plain.splitlines()) == 10
    assert " ." in tokens


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
