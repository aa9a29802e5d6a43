"""The commit that a run is recorded with, and whether the files still are that commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ffprune.stages.lineage import git_state

OWN = ("dvc.lock", "metrics/summary.json", "metrics/results.json", "data/.gitignore", "studies/small/dvc.lock")


@pytest.fixture(params=[".", "inside/another"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A committed project, also as a part of a repository that has more than it."""
    folder = tmp_path / request.param
    for name in (*OWN, "params.yaml", "src/code.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("before")
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return folder


def test_what_a_run_writes_leaves_its_clone_clean(project: Path) -> None:
    commit = git_state(project)["git.commit"]
    assert len(commit) == 40
    for name in OWN:
        (project / name).write_text("after")
    assert git_state(project) == {"git.commit": commit, "git.dirty": "false"}
    assert git_state(project / "studies" / "small")["git.dirty"] == "false"


@pytest.mark.parametrize("name", ["params.yaml", "src/code.py"])
def test_what_people_change_does_not(project: Path, name: str) -> None:
    (project / name).write_text("after")
    assert git_state(project)["git.dirty"] == "true"
    assert git_state(project / "studies" / "small")["git.dirty"] == "true"


def test_outside_git_nothing_is_said(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}
