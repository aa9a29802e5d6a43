"""The project's own small task (METHODS 8): which of four sentences comes next?"""

from __future__ import annotations

import bisect
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffprune.core.errors import ParameterError, TooLittleText

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
# WikiText's tokenised lines have a space before the mark.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]% ][.!?])[\"”]?\s+(?=[\"“(]?[A-Z])")


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
        The path of the task file, for :func:`ffprune.evaluate.harness.evaluate_tasks`.

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
