"""What every test shares."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# The same examples at every run: a change is blamed for what it broke, not for the draw. To look further:
# HYPOTHESIS_PROFILE=explore make check
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on several threads, and far slower when the machine is busy."""
    import torch  # here: the process that only hands tests out to others does without

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: while one process is busy with it, the other can run all the rest."""
    items.sort(key=lambda item: "test_default_pipeline" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What the libraries left in memory stays until the end: no garbage collection need walk it again."""
    gc.freeze()
