"""A row of every benchmark's results: a metric with its median and range, and the command that measures it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any


def row(metric: str, values: Sequence[float], goal: float | str, setting: str) -> dict[str, Any]:
    """What ``results/NAME.json`` has of a metric, four digits behind the point."""
    value, low, high = (round(float(f(values)), 4) for f in (median, min, max))
    found = {"metric": metric, "value": value, "low": low, "high": high, "goal": goal, "setting": setting}
    return found | {"command": f"python benchmarks/{Path(sys.argv[0]).name}"}
