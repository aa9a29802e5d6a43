"""State of a running search, kept between updates: one safetensors file, replaced whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ffprune.allocate.env import Episode
from ffprune.allocate.race import Candidate
from ffprune.core.outcome import Outcome
from ffprune.core.units import Allocation, Unit
from ffprune.stages.artifacts import read_metadata, read_tensors, write_tensors


class SearchStore:
    """A :class:`ffprune.allocate.search.Store` in a folder.

    Args:
        folder: the stage's checkpoint folder, already particular to parameters and inputs.
        units: the units of the problem.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        self._path, self._units = folder / "search.safetensors", tuple(units)

    def load(self) -> tuple[dict[str, Tensor], list[Episode], list[Candidate]] | None:
        """The last saved state, or None."""
        if not self._path.exists():
            return None
        kept = read_metadata(self._path)
        episodes = [
            Episode(
                row["number"],
                row["sparsity"],
                row["samples"],
                row["draw"],
                np.array(row["scores"]),
                Allocation(self._units, tuple(row["kept"])),
                Outcome(**row["outcome"]),
            )
            for row in json.loads(kept["episodes"])
        ]
        starts = [
            Candidate(
                row["name"],
                Allocation(self._units, tuple(row["kept"])),
                tuple(Outcome(**lap) for lap in row["laps"]),
            )
            for row in json.loads(kept["starts"])
        ]
        return read_tensors(self._path), episodes, starts

    def save(self, agent: dict[str, Tensor], episodes: Sequence[Episode], starts: Sequence[Candidate]) -> None:
        """Replace the saved state."""
        rows = [
            {
                "number": e.number,
                "sparsity": e.sparsity,
                "samples": e.samples,
                "draw": e.draw,
                "scores": e.scores.tolist(),
                "kept": e.allocation.kept,
                "outcome": _outcome(e.outcome),
            }
            for e in episodes
        ]
        known = [{"name": c.name, "kept": c.allocation.kept, "laps": [_outcome(lap) for lap in c.laps]} for c in starts]
        write_tensors(self._path, agent, {"episodes": json.dumps(rows), "starts": json.dumps(known)})


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
