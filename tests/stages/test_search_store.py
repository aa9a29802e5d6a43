"""The state of a running search, written and read back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.env import Episode, PruningEnv
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate
from ffprune.allocate.search import search
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.errors import UnsafeFile
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation
from ffprune.stages import artifacts
from ffprune.stages.search_store import SearchStore
from tests.allocate.worlds import Bandit, layers

UNITS = layers(2)
SMALL = Preset((16,), (16,), 1e-2, 0.2, 4, 2, 0.3)
FLAT = Schedule(1.0, 1.0, 0.0)
CUT = Allocation(UNITS, (2, 30, 3, 12))


def episodes() -> list[Episode]:
    good = Outcome(0.1 + 0.2, 0.1, 12.345678901234567, 10.0, True, 44)
    bad = Outcome(0.0, math.inf, math.inf, 10.0, False, 44)
    scores = np.array([0.1, -1 / 3, 2e-17, 10.0])
    return [Episode(0, 0.1 + 0.2, 3, 0, scores, CUT, good), Episode(1, 1 / 3, 4, 2, -scores, CUT, bad)]


def starts() -> list[Candidate]:
    return [
        Candidate("dynamic programming, bent", CUT, (Outcome(0.5, 0.7, 20.0, 10.0, True, 8),) * 3),
        Candidate("hopeless", Allocation.dense(UNITS), (Outcome(0.0, math.inf, math.inf, 10.0, False, 8),)),
    ]


def agent() -> Agent:
    problem = Problem(UNITS, 0.3, Bounds(0.1, 1.0), "water_fill", 1, Bandit((1.0, 2.0, 3.0, 4.0)))
    made = Agent(PruningEnv(problem, FLAT, 4, lambda _: None), SMALL, 0)
    made.update()
    return made


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert SearchStore(tmp_path, UNITS).load() is None


def test_all_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    state = agent().state()
    SearchStore(tmp_path, UNITS).save(state, episodes(), starts())
    loaded = SearchStore(tmp_path, UNITS).load()
    assert loaded is not None
    tensors, past, known = loaded
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    for found, expected in zip(past, episodes(), strict=True):
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert (found.number, found.sparsity, found.samples) == (expected.number, expected.sparsity, expected.samples)
        assert (found.allocation, found.outcome) == (expected.allocation, expected.outcome)
    assert known == starts()
    agent().load_state(tensors)


def test_a_search_without_episodes_or_starts_is_kept_too(tmp_path: Path) -> None:
    SearchStore(tmp_path, UNITS).save({"counters": torch.tensor([0])}, [], [])
    loaded = SearchStore(tmp_path, UNITS).load()
    assert loaded is not None
    assert loaded[1:] == ([], [])


def test_a_save_replaces_the_last_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    store = SearchStore(tmp_path, UNITS)
    store.save({"counters": torch.tensor([1])}, episodes()[:1], [])
    store.save({"counters": torch.tensor([2])}, episodes(), [])
    loaded = store.load()
    assert loaded is not None
    assert int(loaded[0]["counters"]) == 2
    assert len(loaded[1]) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SearchStore(tmp_path, UNITS)
    store.save({"counters": torch.tensor([1])}, episodes(), [])

    def dies(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            store.save({"counters": torch.tensor([2])}, [], [])
    loaded = store.load()
    assert loaded is not None
    assert int(loaded[0]["counters"]) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    store = SearchStore(tmp_path, UNITS)
    store.save({"counters": torch.tensor([1])}, episodes(), [])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UnsafeFile, match="delete it"):
        store.load()


def test_a_search_goes_on_from_the_file(tmp_path: Path) -> None:
    def run(folder: Path, episodes: int, die_at: int | None = None) -> object:
        def told(episode: Episode) -> None:
            if episode.number == die_at:
                raise KeyboardInterrupt

        bounds = Bounds(0.1, 1.0)
        bandit = Bandit((1.0, 2.0, 3.0, 4.0), broken=() if die_at else (2,))
        bandit.calls += [(CUT, Samples(0, None))] * 100  # no call is broken by its number
        problem = Problem(UNITS, 0.3, bounds, "water_fill", 1, bandit, {"uniform": uniform(UNITS, 0.3, bounds)})
        folder.mkdir(exist_ok=True)
        return search(problem, SMALL, FLAT, episodes, 2, 0, SearchStore(folder, UNITS), told)

    whole = run(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 12, die_at=6)
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002 - SB3 uses it
    resumed = run(tmp_path / "killed", 12)
    assert resumed.candidates == whole.candidates  # type: ignore[attr-defined]
    assert all(torch.equal(resumed.agent[name], tensor) for name, tensor in whole.agent.items())  # type: ignore[attr-defined]
    assert artifacts.read_metadata(tmp_path / "killed" / "search.safetensors").keys() == {"episodes", "starts"}
