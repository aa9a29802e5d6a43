"""GPU slots, with made-up GPUs: nothing here has one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from ffprune.core.errors import ParameterError
from ffprune.stages.devices import VARIABLE, Slots, slots_of
from ffprune.stages.params import load_params
from ffprune.stages.record import computes
from ffprune.stages.sections import Compute, Workers
from tests.toy import REPO

GIVEN = load_params(REPO / "params.yaml")


def compute(**changes: Any) -> Compute:
    return Compute.model_validate({**GIVEN.compute.model_dump(), "device": "cuda", **changes})


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def test_a_slot_a_gpu(three: None) -> None:
    assert slots_of(compute(), GIVEN.workers) == ["0", "1", "2"]
    assert slots_of(compute(device="cpu"), GIVEN.workers) == []


def test_gpus_keep_the_names_they_are_given(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "GPU-a, 7,5")
    assert slots_of(compute(), GIVEN.workers) == ["GPU-a", "7", "5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # PyTorch does not see what is named behind a wrong name
    assert slots_of(compute(), GIVEN.workers) == ["GPU-a"]


def test_what_spreads_over_the_gpus_takes_them_all(three: None) -> None:
    assert slots_of(compute(device_map="auto"), GIVEN.workers) == ["0,1,2"]
    assert slots_of(compute(), Workers(count=2, address=None, gpus=1)) == ["0,1,2"]
    assert slots_of(compute(device="cuda:1"), GIVEN.workers) == ["0,1,2"]


def test_no_gpu_is_refused_before_a_stage_starts(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ParameterError, match=r"sees no GPU.*compute\.device to cpu"):
        slots_of(compute(), GIVEN.workers)


def test_a_slot_serves_one_at_a_time_and_comes_back() -> None:
    slots, used, at_once, most = Slots(["0", "1"]), [], 0, 0
    lock, meet = threading.Lock(), threading.Barrier(2)

    def work() -> None:
        nonlocal at_once, most
        with slots.taken() as variables:
            with lock:
                used.append(variables[VARIABLE])
                at_once += 1
                most = max(most, at_once)
            meet.wait(10)  # both slots are in use before one is given back
            with lock:
                at_once -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 2
    assert sorted(used) == ["0"] * 3 + ["1"] * 3


def test_a_failing_stage_gives_its_slot_back() -> None:
    slots = Slots(["0"])
    for _ in range(2):
        with pytest.raises(RuntimeError), slots.taken():
            raise RuntimeError("no")


def test_without_gpus_nothing_waits_and_nothing_is_set() -> None:
    with Slots([]).taken() as first, Slots([]).taken() as second:
        assert first == second == {}


def test_only_stages_that_compute_need_a_gpu() -> None:
    assert [computes(name) for name in ("search", "method@owl-70", "download", "report", "toy")] == [
        *(True, True, False, False, False)
    ]


def test_a_number_that_no_gpu_has_is_refused(three: None) -> None:
    with pytest.raises(ParameterError, match=r"compute\.device is cuda:3.*3 GPUs here, numbered from 0"):
        slots_of(compute(device="cuda:3"), GIVEN.workers)
