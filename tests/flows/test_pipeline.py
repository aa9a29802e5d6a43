"""The flow on a toy repository, as people start it: a process of its own, with a temporary server."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import psutil
import pytest

from ffprune.stages.environment import share_of_threads
from ffprune.stages.exclusive import only_run
from ffprune.stages.params import load_params
from ffprune.stages.tracking import Store, open_store
from tests.toy import alive, make_repo, wait_until

MakeRepo = Callable[..., Path]
COMMAND = [sys.executable, "-c", "from ffprune.cli import main; main()", "run"]


@pytest.fixture
def make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_database: Callable[[], None],
    prefect_home: Path,
) -> MakeRepo:
    def maker(*pipeline: str) -> Path:
        make_repo(tmp_path, monkeypatch, *pipeline)
        with_database()
        monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
        return tmp_path

    return maker


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300)


def states(answer: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(re.findall(r"^([\w@]+): (Completed|Cached|Restored)", answer.stdout, flags=re.MULTILINE))


def parents() -> tuple[Store, list[dict[str, str]]]:
    store = open_store(load_params().tracking)
    return store, [run.data.tags for run in store.client.search_runs([store.experiment_id])]


@pytest.mark.slow
def test_unchanged_needs_no_server_and_is_recorded(make: MakeRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    # No flow is there to hand over to.
    monkeypatch.setenv("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    answer = run()
    assert answer.returncode == 0, answer.stderr
    assert states(answer) == dict.fromkeys("abcd", "Cached")
    (tags,) = parents()[1]
    assert [tags[f"stage.{name}"] for name in "abcd"] == ["cached"] * 4


@pytest.mark.slow
def test_states_tell_what_happened(make: MakeRepo) -> None:
    make()
    first = run("--workers", "2")
    assert first.returncode == 0, first.stderr
    assert states(first) == dict.fromkeys("abcd", "Completed")
    Path("c.in").write_text("2")
    Path("a.txt").unlink()
    second = run()
    # a comes back from the cache; b sees nothing new; c runs and makes the same bytes, so d is unchanged.
    assert states(second) == {"a": "Restored", "b": "Cached", "c": "Completed", "d": "Cached"}
    assert "1 ran" in second.stdout
    _, (newest, oldest) = parents()
    assert oldest["stage.c"] == "ran"
    assert (newest["stage.a"], newest["stage.c"]) == ("restored", "ran")


@pytest.mark.slow
def test_a_failed_stage_fails_the_flow_with_its_own_message(make: MakeRepo) -> None:
    root = make()
    text = (root / "dvc.yaml").read_text()
    refusing = 'echo once >> attempts; echo "error: asked. possible. change." >&2; exit 2'
    (root / "dvc.yaml").write_text(text.replace('"cat a.txt > c.txt; echo c >> c.txt"', f"'{refusing}'"))
    answer = run()
    assert answer.returncode == 1
    assert "error: stage 'c' failed: asked. possible. change." in answer.stderr
    assert "Traceback" not in answer.stderr
    assert states(answer) == {"a": "Completed", "b": "Completed"}
    (tags,) = parents()[1]
    assert (tags["stage.c"], tags["stage.d"]) == ("failed", "not run")
    # A refusal would be the same again.
    assert Path("attempts").read_text() == "once\n"


@pytest.mark.slow
def test_models_come_first_and_one_by_one_and_a_lost_one_stops_its_own_stages_alone(make: MakeRepo) -> None:
    alone = "mkdir busy && sleep 1 && rmdir busy"
    make(f"""
stages:
  download: {{cmd: "{alone} && echo made > a.txt", outs: [a.txt]}}
  fetch:
    foreach: [good, lost]
    do: {{cmd: "{alone} && test ${{item}} = good && echo made > ${{item}}.txt", outs: ["${{item}}.txt"]}}
  method:
    foreach: [good, lost]
    do: {{cmd: "test ! -d busy && echo made > ${{item}}.json", deps: ["${{item}}.txt"], outs: ["${{item}}.json"]}}
  other: {{cmd: "test -f a.txt -a -f good.txt -a ! -d busy && echo made > b.txt", outs: [b.txt]}}
""")
    answer = run("--workers", "5")
    assert answer.returncode == 1
    assert states(answer) == dict.fromkeys(("download", "fetch@good", "method@good", "other"), "Completed")
    (tags,) = parents()[1]
    assert (tags["stage.fetch/lost"], tags["stage.method/lost"]) == ("failed", "not run")


@pytest.mark.slow
def test_what_may_pass_is_tried_again(make: MakeRepo) -> None:
    lost = "test -f attempts && echo made > x; echo once >> attempts; test -f x || exit 75"
    make(f'stages:\n  network: {{cmd: "{lost}", outs: [x]}}\n')
    answer = run()
    assert answer.returncode == 0, answer.stderr
    assert states(answer) == {"network": "Completed"}
    assert Path("attempts").read_text() == "once\n" * 2
    (tags,) = parents()[1]
    assert tags["stage.network"] == "ran"


@pytest.mark.slow
def test_a_run_beside_another_is_refused(make: MakeRepo) -> None:
    root = make()
    with only_run(root):
        answer = run()
    assert answer.returncode == 1
    assert f"where process {os.getpid()} is running the pipeline" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not Path("a.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[SIGINT], [SIGINT, SIGINT], [SIGTERM], [SIGKILL]], ids=str)
def test_a_stopped_flow_ends_soon_and_leaves_no_stage_and_no_server_behind(
    make: MakeRepo, prefect_home: Path, numbers: list[signal.Signals]
) -> None:
    tie = "from ffprune.stages.lifeline import die_with_parent as d; d(); import time; time.sleep(200)"
    command = f"echo $$ >> pids; exec {shlex.quote(sys.executable)} -c '{tie}'"
    # Two that need nothing of each other: the one that waits for its turn must not begin.
    make(f'stages:\n  one: {{cmd: "{command}", outs: [x]}}\n  two: {{cmd: "{command}", outs: [y]}}\n')
    process = subprocess.Popen(
        COMMAND,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # As a shell starts a command: what a terminal sends goes to this group.
        process_group=0,
        # A test run started in the background ignores SIGINT, and so would everything that it starts.
        preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_DFL),
    )
    assert wait_until(lambda: Path("pids").exists() and Path("pids").read_text() != "", 120)
    stage = int(Path("pids").read_text())
    (server,) = (child for child in psutil.Process(process.pid).children() if "uvicorn" in child.cmdline())
    time.sleep(3)  # it ties itself to its parent once Python is up
    for number in numbers:
        # Ctrl-C reaches the whole group at once, kill one process.
        (os.killpg if number == SIGINT else os.kill)(process.pid, number)
        time.sleep(0.2)
    ended = wait_until(lambda: not alive(stage), 2)
    try:
        process.wait(20)  # two seconds on a machine that has nothing else to do
    finally:
        process.kill()
    assert ended
    assert wait_until(lambda: not server.is_running(), 10)
    assert process.returncode == {SIGINT: 130, SIGTERM: 143, SIGKILL: -9}[numbers[0]]
    assert len(Path("pids").read_text().split()) == 1
    # Killed, it can say nothing; interrupted while it says so, it may not come to it.
    if numbers in ([SIGINT], [SIGTERM]):
        assert newest_state(prefect_home) == "CRASHED"
        (tags,) = parents()[1]
        assert {tags["stage.one"], tags["stage.two"]} == {"stopped", "not run"}


def newest_state(home: Path) -> str:
    """What Prefect's database says of the last flow run."""
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        (state,) = database.execute("SELECT state_type FROM flow_run ORDER BY created DESC LIMIT 1").fetchone()
    return str(state)


def test_stages_at_once_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert share_of_threads(1) == {}
    assert share_of_threads(3) == {"OMP_NUM_THREADS": "2"}
    assert share_of_threads(20) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert share_of_threads(3) == {}
