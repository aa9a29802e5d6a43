"""GPU slots: each visible GPU serves one stage at a time, so that two searches never meet on one."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ffprune.core.errors import ParameterError
from ffprune.stages.sections import Compute, Workers

VARIABLE = "CUDA_VISIBLE_DEVICES"


class Slots:
    """A queue of what ``CUDA_VISIBLE_DEVICES`` may be for a stage; without slots nothing waits and nothing is set."""

    def __init__(self, slots: Sequence[str]) -> None:
        self._any = bool(slots)
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)

    @contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """Wait for a slot; yields the variable to set for the stage's process."""
        if not self._any:
            yield {}
            return
        slot = self._free.get()
        try:
            yield {VARIABLE: slot}
        finally:
            self._free.put(slot)


def slots_of(compute: Compute, workers: Workers) -> list[str]:
    """The slots of this machine; none when nothing is computed on a GPU.

    A stage that spreads over the GPUs (``compute.device_map``, or workers with GPUs of their own) takes all of them,
    and so does one that names its GPU (``cuda:1``): with other GPUs hidden the number would mean another one.

    Raises:
        ParameterError: a GPU was asked for and none is visible, or not the one with that number.
    """
    kind, _, number = compute.device.partition(":")
    if kind != "cuda":
        return []
    devices = visible_devices()
    if not devices:
        raise ParameterError(
            f"compute.device is {compute.device}, and {VARIABLE} is {os.environ.get(VARIABLE, 'not set')}",
            "PyTorch sees no GPU here",
            "install a torch build for this GPU, make one visible, or set compute.device to cpu",
        )
    if number and int(number) >= len(devices):
        raise ParameterError(
            f"compute.device is {compute.device}, and {VARIABLE} is {os.environ.get(VARIABLE, 'not set')}",
            f"PyTorch sees {len(devices)} GPU{'s' * (len(devices) > 1)} here, numbered from 0",
            "set compute.device to cuda, or to one of these numbers",
        )
    whole = compute.device_map is not None or bool(workers.count and workers.gpus) or bool(number)
    return [",".join(devices)] if whole else devices


def visible_devices() -> list[str]:
    """The GPUs as ``CUDA_VISIBLE_DEVICES`` names them (numbers or identifiers), else their numbers."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]
