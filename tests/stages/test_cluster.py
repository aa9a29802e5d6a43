"""Real workers: Ray actors on this machine, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ffprune.core.errors import MissingInput, ParameterError, TooLittleText, WorkersLost
from ffprune.stages.context import Nowhere, StageContext
from ffprune.stages.record import DECIDE, STAGES, stage_named
from ffprune.stages.run import call
from tests.stages.test_method_tiny import searching
from tests.stages.tiny_project import MODELS, params, write_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ffprune[ray]'"
    ),
    # Ray leaves sockets and log files to the process's end, and says so.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SEARCH = stage_named("search")
WRITTEN = (*SEARCH.outs, *SEARCH.plots)
# Rounds of four: a lost worker's policy has others before and after it.
ROUNDS: dict[str, Any] = {"episodes": 10, "guide": {"batch": 4, "proposals": 1}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("project")
    write_sources(root, MODELS["llama"]())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in STAGES[: STAGES.index(SEARCH)]:
            call(stage, StageContext(stage, params()))
        # Ray's token must not be left in the home folder.
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield root
        assert not (Path.home() / ".ray").exists()


def running() -> set[psutil.Process]:
    """Processes of Ray below this one, and their session's."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "ffprune-ray-" in words or words.startswith("ray::"):
            found.add(process)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = running()
    yield
    # Ray's agents look for their parent every few seconds.
    for _ in range(600):
        if not running() - before:
            break
        time.sleep(0.1)
    assert not running() - before


def searched(sink: Nowhere | None = None, **changes: Any) -> dict[str, bytes]:
    """What the stage search writes."""
    call(SEARCH, StageContext(SEARCH, params(search=ROUNDS | changes.pop("search", {}), **changes), sink))
    return {name: Path(name).read_bytes() for name in WRITTEN}


@pytest.fixture(scope="module")
def alone(project: Path) -> dict[str, bytes]:
    """What it writes without workers."""
    return searched()


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_workers_changes_no_file(alone: dict[str, bytes], count: int) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    assert searched(workers={"count": count}) == alone
    assert signal.getsignal(signal.SIGTERM) is ours


class Kills(Nowhere):
    """Kills one worker, as if it were out of memory, when a trial is told of."""

    def __init__(self, at: int) -> None:
        self.at, self.killed = at, 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if step == self.at:
            workers = [p for p in psutil.process_iter(["cmdline"]) if _is_worker(p)]
            os.kill(workers[0].pid, signal.SIGKILL)
            self.killed += 1


def _is_worker(process: psutil.Process) -> bool:
    return bool(process.info["cmdline"]) and process.info["cmdline"][0].startswith("ray::Trier")


def test_a_lost_workers_trial_is_run_again_and_no_file_changes(alone: dict[str, bytes]) -> None:
    sink = Kills(at=4)
    assert searched(sink, workers={"count": 2}) == alone
    assert sink.killed == 1


class Dies(Nowhere):
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if step == 6:
            raise KeyboardInterrupt


def test_a_search_killed_with_workers_goes_on_without_them_and_the_other_way_round(alone: dict[str, bytes]) -> None:
    for first, then in ((2, 0), (0, 2)):
        with pytest.raises(KeyboardInterrupt):
            searched(Dies(), workers={"count": first})
        assert list(Path(".ckpt/search").rglob("*.safetensors"))
        assert searched(workers={"count": then}) == alone


@pytest.mark.parametrize("compressor", ["slice", "mask"])
def test_a_methods_search_is_sent_to_workers_as_it_is(project: Path, compressor: str) -> None:
    entry = searching("eas", compressor=compressor, sparsity=0.4, trials=8)
    if compressor == "slice":
        entry["repair"] = "ridge"
    found = []
    for count in (0, 2):
        stage = DECIDE.of("small")
        call(stage, StageContext(stage, params(methods={"small": entry}, workers={"count": count})))
        found.append({**json.loads(Path(stage.outs[0]).read_text()), "seconds": 0.0})
    assert found[0] == found[1]


def test_bad_input_is_refused_as_it_is_without_workers(project: Path) -> None:
    said = []
    for count in (0, 2):
        with pytest.raises(TooLittleText) as caught:
            searched(search={"final_samples": 10_000}, workers={"count": count})
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "search.final_samples" in said[0]


def test_more_workers_than_there_is_room_for_are_refused(project: Path) -> None:
    with pytest.raises(ParameterError, match=r"workers\.count 1000.*search\.threads.*room for \d+ on 1 machine"):
        searched(workers={"count": 1000})


def test_an_address_where_no_one_answers_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    with pytest.raises(MissingInput, match=r"workers\.address auto was asked.*docs/workers\.md"):
        searched(workers={"count": 1, "address": "auto"})


def test_workers_that_end_at_once_are_given_up(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffprune.stages.search.search_reward", ends)
    with pytest.raises(WorkersLost, match=r"1 worker\(s\); 3 in a row"):
        searched(workers={"count": 1})


def ends(ctx: StageContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_stage_leaves_no_process(project: Path, number: signal.Signals) -> None:
    Path("params.yaml").write_text(
        json.dumps(params(search=ROUNDS | {"episodes": 400}, workers={"count": 2}).model_dump(mode="json"))
    )
    with subprocess.Popen([sys.executable, "-m", "ffprune", "search"], stderr=subprocess.PIPE, text=True) as stage:
        assert stage.stderr is not None
        for line in stage.stderr:
            if re.search(r"search 0\.2: [1-9]", line):
                break
        stage.send_signal(number)
        stage.stderr.read()
        assert stage.wait() == (128 + number if number == signal.SIGTERM else -number)
