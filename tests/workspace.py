"""Copies of the project to run commands in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ffprune.stages.editing import set_parameters
from ffprune.stages.params import PARAMS_FILE
from tests.toy import REPO, SETTINGS


def environment() -> dict[str, str]:
    """Variables for a command in a copy: the `ffprune` of these tests, no settings of whoever runs them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "DVC_NO_ANALYTICS": "1"}


def copy_project(folder: Path, *parts: str) -> None:
    """What git has or would take of the project, or of some parts of it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *parts], cwd=REPO, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        # A recorded run of the default would only be restored here if its cache were shared; it is not.
        if name != "dvc.lock" and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)


def stages_run(output: str) -> list[str]:
    """The stages whose command ran, by what `dvc repro` said."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


class Workspace:
    """A copy of the project to run commands in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        copy_project(folder)
        for words in (
            ["init", "-q"],
            ["add", "-A"],
            ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
        ):
            subprocess.run(["git", *words], cwd=folder, check=True)
        self.environment = environment()

    def set(self, values: dict[str, Any]) -> None:
        set_parameters(values, self.folder / PARAMS_FILE)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def stages_run(self) -> list[str]:
        return stages_run(self.run("-m", "dvc", "repro"))

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics" / "summary.json").read_text())
        return found

    def row(self, method: str, sparsity: float) -> dict[str, Any]:
        rows = self.summary["rows"]
        return next(row for row in rows if row["method"] == method and row["sparsity_target"] == sparsity)
