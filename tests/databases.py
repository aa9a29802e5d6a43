"""Databases that take seconds to make, made once: the conftest files of tests/stages and tests/flows share these."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a run: making them takes seconds, copying the file does not."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def with_database(empty_database: Path, tmp_path: Path) -> Callable[[], None]:
    """Puts the tables into the test's own workspace."""

    def put() -> None:
        (tmp_path / "mlruns").mkdir()
        shutil.copy(empty_database, tmp_path / "mlruns")

    return put


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Prefect database for all flows of a session: making it takes longer than the flows."""
    return tmp_path_factory.mktemp("prefect")
