"""What every test shares."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# The same examples at every run: a change is blamed for what it broke, not for the draw. To look further:
# HYPOTHESIS_PROFILE=explore make check
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on several threads, and far slower when the machine is busy."""
    torch.set_num_threads(1)
