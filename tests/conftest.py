"""What every test shares: one thread, and servers' state of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on several threads, and far slower when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs: migrating takes seconds, so it happens once."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def with_database(empty_database: Path) -> Callable[[], None]:
    """Gives the current folder a migrated database, where tracking looks for it."""

    def place() -> None:
        target = Path("mlruns") / "mlflow.db"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(empty_database, target)

    return place


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's state, away from the user's and from the project's."""
    return tmp_path_factory.mktemp("prefect")
