"""One run of the tiny pipeline, in a store that its makers' clones know; made once, since it takes half a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.sharing.team import Clone, found_project


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The team's folder; a test that changes it takes a copy."""
    return tmp_path_factory.mktemp("team") / "the store"


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Clone:
    """Who ran the pipeline, pushed and committed; not to be changed."""
    torch.set_num_threads(1)  # before the fixture of every single test
    folder = tmp_path_factory.mktemp("first")
    clone = found_project(folder / "project", folder / "site")
    clone.dvc("remote", "add", "-d", "store", str(store))
    clone.dvc("push", "--quiet")
    clone.commit("The store")
    return clone
