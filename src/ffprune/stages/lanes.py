"""Lanes: how many stages run at the same time, as the user says or as the machine has room for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ffprune.stages.record import PIPELINE_MODEL, dense_model
from ffprune.stages.sections import Params

MOST = 4
"""Lanes on processors alone, at most: they share the memory's bandwidth, and more were not measured."""


class Lanes:
    """Places for stages; how many there are is settled when the first stage asks for one.

    Args:
        count: as the user says; 0: as many as there is room for.
        room: says how many; asked once, when the models have been fetched.
    """

    def __init__(self, count: int, room: Callable[[], int]) -> None:
        self._count, self._room = count, room
        self._settling = threading.Lock()
        self._free: threading.BoundedSemaphore | None = None

    @contextmanager
    def taken(self) -> Iterator[int]:
        """Wait for a lane; yields the number of lanes."""
        with self._settling:
            if self._free is None:
                self._count = self._count or self._room()
                self._free = threading.BoundedSemaphore(self._count)
        with self._free:
            yield self._count


def room(root: Path, params: Params, slots: Sequence[str]) -> int:
    """Stages that fit on this machine at the same time: one a GPU slot, else one a processor, all in memory at once.

    On two processors, two stages with one thread each do about 1.5 times what one with two threads does.

    Args:
        root: of the pipeline; the largest of its dense models says what a stage needs (``ffprune plan``). Without one,
            one lane.
        params: of the pipeline.
        slots: of :func:`ffprune.stages.devices.slots_of`.
    """
    most = len(slots) or min(MOST, os.cpu_count() or 1)
    named = [(root / dense_model(name)).absolute() for name in (PIPELINE_MODEL, *params.models)]
    here = [folder for folder in named if (folder / "config.json").is_file()]
    if most == 1 or not here:
        return 1
    # Heavy, and a run with nothing to do needs none of it.
    import psutil

    from ffprune.models.view import ModelView
    from ffprune.stages.costs import costs
    from ffprune.stages.plan import config_of, meta_model

    configs = [config for _, config in map(config_of, map(str, here))]
    needed = max(cost.memory for config in configs for cost in costs(ModelView(meta_model(config)), params))
    return max(1, min(most, int(psutil.virtual_memory().available // needed)))
