"""Policy files: one allocation with what is known about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffprune.core.units import Allocation
from ffprune.stages.artifacts import read_json


def read_policy(path: Path) -> tuple[Allocation, dict[str, Any]]:
    """The allocation of a policy file, and the whole file."""
    policy = read_json(path)
    return Allocation.from_rows(policy["units"]), policy
