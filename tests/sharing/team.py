"""A team's clones of one project, whose pipeline is that of dvc.yaml on a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ffprune.stages.artifacts import write_json
from ffprune.stages.context import Nowhere, StageContext
from ffprune.stages.editing import set_parameters
from ffprune.stages.lineage import recorded_hashes
from ffprune.stages.params import PARAMS_FILE
from ffprune.stages.record import RESULTS, STAGES, SUMMARY
from ffprune.stages.run import call
from tests.stages.tiny_project import MODELS, params, write_sources
from tests.workspace import copy_project, environment, stages_run

#: What a clone needs to run: no tests, no documents.
_PARTS = ("dvc.yaml", "Makefile", ".dvc", ".dvcignore", ".gitignore", "data", "flows", "metrics", "mlruns", "models")
_PARTS += ("profiles", "pyproject.toml", "reports", "requirements.lock", "src")


class Clone:
    """One person's folder; commands in it see no variable, cache or settings of whoever runs the tests."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder = folder
        packages = os.pathsep.join(filter(None, [str(folder / "src"), os.environ.get("PYTHONPATH")]))
        self.environment = {
            **environment(),
            "PYTHONPATH": packages,
            # Each person's own memory of hashes, as on machines of their own.
            "DVC_SITE_CACHE_DIR": str(site),
            "DVC_GLOBAL_CONFIG_DIR": str(site / "config"),
            "DVC_SYSTEM_CONFIG_DIR": str(site / "config"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "t",
            "GIT_CONFIG_KEY_1": "user.email",
            "GIT_CONFIG_VALUE_1": "t@t",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def say(self, *words: str, status: int = 0) -> str:
        """What a command prints, both streams; it must end with this status."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == status, f"{words}: status {process.returncode}\n{output[-4000:]}"
        return output

    def dvc(self, *words: str, status: int = 0) -> str:
        return self.say(sys.executable, "-m", "dvc", *words, status=status)

    def ffprune(self, *words: str, status: int = 0) -> str:
        return self.say(sys.executable, "-m", "ffprune", *words, status=status)

    def git(self, *words: str) -> str:
        return self.say("git", *words)

    def repro(self, *words: str, status: int = 0) -> list[str]:
        """The stages whose command ran."""
        return stages_run(self.dvc("repro", *words, status=status))

    def set(self, key: str, value: Any) -> None:
        """Change one parameter."""
        set_parameters({key: value}, self.folder / PARAMS_FILE)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message)

    def entry(self, path: str) -> Path:
        """Where a store keeps an output, or the list of a folder's files."""
        key = recorded_hashes(self.folder / "dvc.lock")[path]
        return Path("files", "md5", key[:2], key[2:])

    @property
    def cache(self) -> Path:
        return self.folder / ".dvc" / "cache"


def found_project(folder: Path, site: Path) -> Clone:
    """The first person's folder after a run: the project as it is, with a tiny model and a small text."""
    folder.mkdir(parents=True)
    copy_project(folder, *_PARTS)
    for name in (SUMMARY, RESULTS):
        (folder / name).unlink(missing_ok=True)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params().model_dump(mode="json"), file)
    clone = Clone(folder, site)
    clone.git("init", "-q", "-b", "main")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_sources(folder, MODELS["llama"]())
        for stage in STAGES:
            # In one process, and then told to DVC: eleven processes would take minutes to import the same libraries.
            call(stage, StageContext(stage, params(), Nowhere()))
            write_json(Path(stage.run_record), {"stage": stage.name})
    shutil.rmtree(folder / "source")
    clone.dvc("commit", "--quiet", "--force", *(stage.name for stage in STAGES))
    clone.commit("The project and its first run")
    return clone


def colleague(origin: Clone, folder: Path, *words: str) -> Clone:
    """A fresh clone, beside it the person's own memory of hashes."""
    subprocess.run(["git", "clone", "-q", *words, origin.folder.as_uri(), str(folder)], check=True)
    return Clone(folder, folder.with_name(f"{folder.name} site"))
