from __future__ import annotations

import pytest

from ffprune.stages import progress


def test_without_a_terminal_a_long_loop_prints_little(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(100, "search") as bar:
        for _ in range(100):
            now[0] += 0.25
            bar.update(reward=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "search: 40/100, 10 s, 15 s left reward 0.1235",
        "search: 80/100, 20 s, 5 s left reward 0.1235",
        "search: 100/100, 25 s, 0 s left reward 0.1235",
    ]
    assert progress.read_line(lines[1]) == progress.Step("search", 80, 100, "reward 0.1235")
    assert progress.read_line("Running stage 'search':") is None


def test_a_line_without_values_or_estimate_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(4, "search 0.2: resumed", done=3):
        pass
    assert progress.read_line(capsys.readouterr().err.strip()) == progress.Step("search 0.2: resumed", 3, 4, "")


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.TERMINAL_VARIABLE, "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.Progress(4, "search", done=1) as bar:
        bar.update(3, perplexity=21.38)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "perplexity 21.38" in shown
