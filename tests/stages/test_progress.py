from __future__ import annotations

import contextlib
import io
import sys
import time

import pytest

from ffprune.allocate.problem import Standing
from ffprune.stages import progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_long_loop_prints_little(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Progress(100, "search") as bar:
        for _ in range(100):
            now[0] += 0.25
            bar.update(reward=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "search: 40/100, 10 s, 4/s, 15 s left reward 0.1235",
        "search: 80/100, 20 s, 4/s, 5 s left reward 0.1235",
        "search: 100/100, 25 s, 4/s, 0 s left reward 0.1235",
    ]
    assert progress.read_line(lines[1]) == progress.Step("search", 80, 100, "reward 0.1235")
    assert progress.read_line("Running stage 'search':") is None


def test_a_line_without_values_or_estimate_is_read(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Progress(4, "search 0.2: resumed", done=3):
        now[0] = 5.0
    assert progress.read_line(capsys.readouterr().err.strip()) == progress.Step("search 0.2: resumed", 3, 4, "")


def test_a_loop_that_takes_a_moment_prints_nothing(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Progress(4, "prune") as bar:
        now[0] = 2.9
        bar.update(4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("steps", "seconds", "rate"),
    [(40, 10, "4/s"), (37, 40, "0.93/s"), (1, 60, "0.017/s"), (12345, 10, "1234/s"), (36, 10, "3.6/s"), (1, 2e4, None)],
)
def test_a_rate_has_two_figures_and_no_exponent(
    capsys: pytest.CaptureFixture[str], now: list[float], steps: int, seconds: float, rate: str | None
) -> None:
    with progress.Progress(20_000, "stage") as bar:
        now[0] = seconds
        bar.update(steps)
    line = capsys.readouterr().err.splitlines()[0]
    assert f", {rate or '0.00005/s'}, " in line
    found = progress.read_line(line)
    assert found is not None and found.done == steps


def test_where_no_end_is_known_time_runs(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Progress(0, "download") as bar:
        now[0] = 10.0
        bar.update(0, source="a wheel")
        now[0] = 20.0
        bar.update(5)
        bar.total = 10
        now[0] = 30.0
        bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "download: 10 s source a wheel",
        "download: 5, 20 s, 0.25/s source a wheel",
        "download: 6/10, 30 s, 0.2/s, 20 s left source a wheel",
    ]
    assert [progress.read_line(line) is None for line in lines[:3]] == [True, True, False]


def test_a_long_step_prints_too_also_where_stderr_is_silenced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.05)
    shown = sys.stderr
    with progress.Progress(4, "evaluate") as bar, contextlib.redirect_stderr(io.StringIO()):
        assert sys.stderr is not shown
        bar.update(1)
        time.sleep(0.4)
    assert "evaluate: 1/4, 0 s, " in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.TERMINAL_VARIABLE, "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Progress(4, "search", done=1) as bar:
        bar.update(3, perplexity=21.38)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "/s " in shown
    assert "0 s left" in shown
    assert "perplexity 21.38" in shown


def test_on_a_terminal_a_bar_without_an_end_shows_time_and_one_that_never_moved_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.TERMINAL_VARIABLE, "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Progress(0, "download"):
        pass
    assert "0:00:00" in capsys.readouterr().err
    with progress.Progress(4, "search"):
        pass
    assert "search" not in capsys.readouterr().err.splitlines()[-1]


def test_bars_follow_each_other(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Bars(progress.Progress) as bars:
        for number in range(4):
            now[0] += 5
            bars.at("search", 8, number).update(1)
        for standing in (
            Standing(0, 12, starts=True),
            Standing(2, 12, "uniform", 31.0),
            Standing(4, 10, "trial 3", float("inf")),
        ):
            now[0] += 6
            bars.race("candidates", standing)
        now[0] += 5
        bars.at("search", 8, 4).update(1)
        now[0] += 5
    assert capsys.readouterr().err.splitlines() == [
        "search: 3/8, 10 s, 0.3/s, 17 s left",
        "search: 4/8, 21 s, 0.19/s, 21 s left",
        "candidates: 4/10, 12 s, 0.33/s, 18 s left best trial 3 perplexity 1e+09",
        "candidates: 4/10, 17 s, 0.24/s, 26 s left best trial 3 perplexity 1e+09",
        "search: 5/8, 5 s, 0.2/s, 15 s left",
    ]


def test_bytes_are_shown_in_megabytes(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    with progress.Bars(progress.Progress) as bars:
        told = bars.megabytes("download", source="a wheel")
        told(0, 0)
        now[0] = 10.0
        told(40_000_000, 120_400_000)
        now[0] = 30.0
        told(120_449_000, 120_400_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "download (MB): 40/120, 10 s, 4/s, 20 s left source a wheel",
        "download (MB): 120/120, 30 s, 4/s, 0 s left source a wheel",
    ]
