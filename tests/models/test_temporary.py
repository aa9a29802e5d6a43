"""What a killed process was writing is removed by the next write beside it, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ffprune.models.temporary import neighbour, remove_leftovers, replacing

# A folder with one inside that has its own neighbour, as an export that saves a model; and a file with another beside.
WRITING = """
import sys, time
from pathlib import Path
from ffprune.models.temporary import neighbour, replacing
target = Path(sys.argv[1])
if sys.argv[2] == "aside":  # between the two renamings
    built = neighbour(target)
    target.replace(built.with_name(built.name + ".old"))
file = neighbour(target.with_name("m.gguf"))
file.write_text("half")
file.with_name(file.name + ".f32").write_text("half")
with replacing(target) as built, replacing(built) as inner:
    (inner / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def killed_while_writing(target: Path, how: str = "", number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The names that are left of a write."""
    with subprocess.Popen([sys.executable, "-c", WRITING, target, how], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # It lives: nothing of its own may go.
        before = names(target.parent)
        remove_leftovers(target.parent)
        assert names(target.parent) == before
        process.send_signal(number)
    return names(target.parent)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_processs_neighbours_go_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    left = killed_while_writing(tmp_path / "out")
    assert len(left) == 5
    with replacing(tmp_path / "another"):
        pass
    assert names(tmp_path) == ["another", "out"]
    assert names(tmp_path / "out") == ["mine"]


def test_a_folder_that_had_stepped_aside_goes_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    left = killed_while_writing(tmp_path / "out", "aside")
    assert "out" not in left
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["mine"]


def test_a_folder_that_had_stepped_aside_goes_where_another_took_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    killed_while_writing(tmp_path / "out", "aside")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "new").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_other_names_and_other_machines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [
        ".out.abcdef-1-12345678",
        ".out.ffprune",
        "out.abcdef-4194305-12345678.ffprune",
        ".out.abcdef-4194305-1234567.ffprune",
        ".out.partial",
        # Of a process that is gone, but on another machine.
        ".out.abcdef-4194305-12345678.ffprune",
    ]
    for name in mine:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine)
    monkeypatch.setattr("ffprune.models.temporary._host", lambda: "abcdef")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine[:-1])


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with replacing(tmp_path / "out") as built:
        (built / "new").touch()
    assert names(tmp_path) == ["kept", "out"]
    assert names(tmp_path / "kept") == ["file"]
    assert names(tmp_path / "out") == ["new"]


def test_neighbours_differ_and_are_beside(tmp_path: Path) -> None:
    first, second = neighbour(tmp_path / "x.json"), neighbour(tmp_path / "x.json")
    assert first != second
    assert first.parent == tmp_path


def test_an_empty_folder_does_not_step_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go back as a finished output, were its process killed there."""
    moved, replace = [], Path.replace

    def watched(path: Path, to: Path) -> Path:
        moved.append(to.name)
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", watched)
    with replacing(tmp_path / "out") as built, replacing(built) as inner:
        (inner / "new").touch()
    assert len(moved) == 2
    assert not [name for name in moved if name.endswith(".old")]
    assert names(tmp_path / "out") == ["new"]
