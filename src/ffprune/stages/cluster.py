"""Workers that are Ray actors, on this machine or on a cluster; Ray is optional (``ffprune[ray]``).

What a trial computes is settled before it is known who computes it: by the parameters, the project's files and the
number of threads (``search.threads``), which go to every worker alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ffprune.allocate.problem import Reward
from ffprune.core.errors import FfpruneError, MissingInput, ParameterError
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation
from ffprune.stages.environment import keep_memory, quieten
from ffprune.stages.sections import Trials, Workers
from ffprune.stages.workers import Lost, Pool, Ticket

Make = Callable[[], Reward]


@contextmanager
def hired(make: Make, workers: Workers, trials: Trials) -> Iterator[Reward]:
    """What ``make`` makes: in this process, or in as many workers as there should be.

    Args:
        make: makes the reward; for workers it must be picklable, and is called in each of them, in this folder.
        workers: how many, and where.
        trials: what a trial costs.

    Raises:
        ParameterError: there is no Ray, or not enough of it.
        MissingInput: no cluster answers at the address.
    """
    if not workers.count:
        yield make()
        return
    check_installed(workers)
    threads = trials.threads or torch.get_num_threads()
    with _connected(workers.address) as ray:
        _check_room(ray.nodes(), workers, threads)
        yield Pool(_RayCrew(ray, make, threads, workers.gpus), workers.count, trials.samples, trials.final_samples)


def check_installed(workers: Workers) -> None:
    """Refuse workers where Ray is not installed, before any work."""
    if workers.count and importlib.util.find_spec("ray") is None:
        raise ParameterError(
            f"workers.count {workers.count} was asked for",
            "Workers are Ray actors, and Ray is not installed here",
            "Install the extra (pip install 'ffprune[ray]'), or set workers.count to 0",
        )


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray: of this process alone, and gone with it, or of the cluster at an address."""
    quieten()
    ray = importlib.import_module("ray")
    ours = signal.getsignal(signal.SIGTERM)
    if not address:
        # Keeps everyone else out; Ray's own would be left in the home folder, for others to read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Sockets lie below it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ffprune-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        alone = {
            "include_dashboard": False,
            "_temp_dir": folder,
            # Trials are the work; Ray would have them step back behind all else on the machine.
            "_system_config": {"worker_niceness": 0},
        }
        try:
            try:
                # "local", since None would follow RAY_ADDRESS.
                ray.init(
                    address=address or "local",
                    logging_level="error",
                    log_to_driver=False,
                    **({} if address else alone),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _not_connected(address, error) from error
            with suppress(ValueError):  # only the main thread has handlers, and only there Ray has put its own
                signal.signal(signal.SIGTERM, ours)
            yield ray
        finally:
            ray.shutdown(wait_for_processes=True)


def _not_connected(address: str | None, error: Exception) -> MissingInput:
    return MissingInput(
        f"workers.address {address} was asked for, and Ray says: {' '.join(str(error).split())}",
        "A cluster of the same versions of Ray and Python must be up there, and this machine be part of it",
        "Start it, say RAY_AUTH_MODE=token here too if it asks for a token (docs/workers.md), or correct or drop "
        "workers.address",
    )


def _check_room(nodes: Sequence[dict[str, Any]], workers: Workers, threads: int) -> None:
    """Ray would wait for what never comes."""
    rooms = [_room(node["Resources"], workers.gpus, threads) for node in nodes if node["Alive"]]
    if sum(rooms) < workers.count:
        gpus = f" and {workers.gpus:g} GPUs" if workers.gpus else ""
        raise ParameterError(
            f"workers.count {workers.count} was asked for, each with {threads} processors (search.threads){gpus}",
            f"Ray has room for {sum(rooms)} on {len(rooms)} machine(s)",
            "Lower workers.count or workers.gpus, add machines, or lower search.threads (the search then runs again: "
            "a trial's numbers depend on its threads)",
        )


def _room(resources: dict[str, float], gpus: float, threads: int) -> int:
    """How many workers a machine holds; a share of a GPU is of one."""
    processors = int(resources.get("CPU", 0)) // threads
    if not gpus:
        return processors
    there = int(resources.get("GPU", 0))
    return min(processors, there * int(1 / gpus) if gpus < 1 else there // int(gpus))


class _RayCrew:
    """A :class:`ffprune.stages.workers.Crew` of actors."""

    def __init__(self, ray: Any, make: Make, threads: int, gpus: float) -> None:
        self._ray = ray
        # Once for all actors: a reward that is sent whole is as large as its model.
        self._given = Path.cwd(), threads, torch.get_float32_matmul_precision(), ray.put(make)
        self._class = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(Trier)
        self._actors: dict[int, Any] = {}
        errors = ray.exceptions
        self._losses = (errors.RayActorError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError)

    def hire(self, worker: int) -> Ticket:
        if worker in self._actors:
            # It may be out of reach only; it must not come back to take the room of the next.
            self._ray.kill(self._actors[worker])
        self._actors[worker] = self._class.remote(*self._given)
        return self._actors[worker].start.remote()

    def ask(self, worker: int, allocation: Allocation, samples: Samples) -> Ticket:
        return self._actors[worker].score.remote(allocation, samples)

    def wait(self, tickets: Sequence[Ticket]) -> Ticket:
        return self._ray.wait(list(tickets), num_returns=1)[0][0]

    def answer(self, ticket: Ticket) -> Outcome | None:
        try:
            found: Outcome | FfpruneError | None = self._ray.get(ticket)
        except self._losses as loss:
            raise Lost(" ".join(str(loss).split())) from loss
        if isinstance(found, FfpruneError):
            raise found
        return found


class Trier:
    """What runs in an actor: a reward, made once. Refusals are answers, since Ray would wrap them in a traceback.

    Args:
        folder: the project's.
        threads: of every trial.
        precision: of float32 products.
        make: makes the reward.
    """

    def __init__(self, folder: Path, threads: int, precision: str, make: Make) -> None:
        self._folder, self._threads, self._precision, self._make = folder, threads, precision, make

    def start(self) -> FfpruneError | None:
        """Make the reward."""
        quieten()
        keep_memory()
        torch.set_num_threads(self._threads)
        torch.set_float32_matmul_precision(self._precision)
        try:
            if not self._folder.is_dir():
                raise MissingInput(
                    f"A worker on {os.uname().nodename} was to read {self._folder}",
                    "There is no such folder on that machine",
                    "Share the project's folder, under the same path, with all machines of the cluster",
                )
            os.chdir(self._folder)
            self._reward = self._make()
        except FfpruneError as refusal:
            return refusal
        return None

    def score(self, allocation: Allocation, samples: Samples) -> Outcome | FfpruneError:
        """Try a policy."""
        try:
            (outcome,) = self._reward.many([allocation], samples)
        except FfpruneError as refusal:
            return refusal
        return outcome
