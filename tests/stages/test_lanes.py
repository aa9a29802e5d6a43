"""Lanes: how many stages run at once, and when that is settled."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import LlamaConfig

from ffprune.models.view import ModelView
from ffprune.stages.costs import costs
from ffprune.stages.lanes import MOST, Lanes, room
from ffprune.stages.params import load_params
from ffprune.stages.plan import meta_model
from ffprune.stages.record import DENSE, dense_model
from tests.toy import REPO

GIVEN = load_params(REPO / "params.yaml")
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    CONFIG.save_pretrained(tmp_path / DENSE)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    return tmp_path


def free(monkeypatch: pytest.MonkeyPatch, models: float) -> None:
    """Give the machine memory for so many of the toy's stages."""
    needed = max(cost.memory for cost in costs(ModelView(meta_model(CONFIG)), GIVEN))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=models * needed))


@pytest.mark.parametrize(("models", "lanes"), [(0.4, 1), (1.9, 1), (2.1, 2), (3.5, 3), (100, MOST)])
def test_memory_bounds_the_lanes(project: Path, monkeypatch: pytest.MonkeyPatch, models: float, lanes: int) -> None:
    free(monkeypatch, models)
    assert room(project, GIVEN, []) == lanes


def test_processors_and_gpus_bound_them_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 100)
    assert room(project, GIVEN, ["0", "1", "2", "3", "4", "5"]) == 6
    assert room(project, GIVEN, ["0,1"]) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert room(project, GIVEN, []) == 2


def test_the_largest_of_several_models_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = GIVEN.model_copy(update={"models": dict.fromkeys(("small", "large", "absent"), GIVEN.model)})
    free(monkeypatch, 3.5)
    small = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 1})
    small.save_pretrained(project / dense_model("small"))
    alone = room(project, given, [])
    large = LlamaConfig(**{**CONFIG.to_dict(), "vocab_size": 10_000_000})
    large.save_pretrained(project / dense_model("large"))
    assert (alone, room(project, given, [])) == (3, 1)


def test_without_a_model_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert room(tmp_path, GIVEN, []) == 1


def test_room_is_asked_once_and_not_before_a_stage_wants_a_lane() -> None:
    asked = []

    def answer() -> int:
        asked.append(1)
        return 2

    lanes = Lanes(0, answer)
    assert not asked
    meet, counts = threading.Barrier(2), []

    def work() -> None:
        with lanes.taken() as count:
            meet.wait(10)  # two are in at the same time
            counts.append(count)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert counts == [2] * 4
    assert asked == [1]


def test_what_the_user_says_is_not_questioned() -> None:
    with Lanes(3, lambda: pytest.fail("asked")).taken() as count:
        assert count == 3
