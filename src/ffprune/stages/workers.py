"""Policies tried side by side: whoever is idle gets the next one, and the answers keep the order of the questions.

Nothing here knows what a worker is: :mod:`ffprune.stages.cluster` has Ray's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ffprune.core.errors import WorkersLost
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation

Ticket = Any
"""Stands for an answer to come; hashable."""

_PATIENCE = 3
"""Losses of every worker, on average, with no policy tried in between."""


class Lost(Exception):
    """A worker ended before it answered."""


class Crew(Protocol):
    """Workers by number, each with a model of its own."""

    def hire(self, worker: int) -> Ticket:
        """Start a worker, in place of the one that had this number; the answer, None, says that it has its model."""

    def ask(self, worker: int, allocation: Allocation, samples: Samples) -> Ticket:
        """Have a policy tried by a worker that is ready and idle."""

    def wait(self, tickets: Sequence[Ticket]) -> Ticket:
        """The first of these that has its answer, or never will."""

    def answer(self, ticket: Ticket) -> Outcome | None:
        """The answer.

        Raises:
            Lost: there will be none.
            FfpruneError: the worker refused.
        """


class Pool:
    """A :class:`ffprune.allocate.problem.Reward` whose trials run on workers.

    An outcome depends on its policy and samples alone, so it does not matter who tries what, and when. A policy whose
    worker is lost is tried again by another, or by the one that takes its place.

    Args:
        crew: the workers.
        count: how many to hire, 1 or more.
        most_samples: N_max of FF Eq. 5.
        fixed: samples of a comparison.
    """

    def __init__(self, crew: Crew, count: int, most_samples: int, fixed: int) -> None:
        self.most_samples, self.fixed = most_samples, fixed
        self._crew, self._count = crew, count
        # Who is at work on which of the policies asked for; None: on getting ready.
        self._busy: dict[Ticket, tuple[int, int | None]] = {
            crew.hire(worker): (worker, None) for worker in range(count)
        }
        self._idle: deque[int] = deque()
        self._losses = 0

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        """The outcomes in the order of the policies, each as soon as those before it are known.

        Raises:
            WorkersLost: workers end faster than they try policies.
            FfpruneError: a worker refused.
        """
        waiting = deque(range(len(allocations)))
        found: dict[int, Outcome] = {}
        for number in range(len(allocations)):
            while number not in found:
                self._set_to_work(waiting, allocations, samples)
                self._collect(waiting, found)
            # Before whoever reads this takes their time.
            self._set_to_work(waiting, allocations, samples)
            yield found.pop(number)

    def _set_to_work(self, waiting: deque[int], allocations: Sequence[Allocation], samples: Samples) -> None:
        while waiting and self._idle:
            worker, number = self._idle.popleft(), waiting.popleft()
            self._busy[self._crew.ask(worker, allocations[number], samples)] = worker, number

    def _collect(self, waiting: deque[int], found: dict[int, Outcome]) -> None:
        """Wait for one answer."""
        ticket = self._crew.wait(list(self._busy))
        worker, number = self._busy.pop(ticket)
        try:
            outcome = self._crew.answer(ticket)
        except Lost as loss:
            if number is not None:
                waiting.appendleft(number)
            self._replace(worker, loss)
            return
        self._idle.append(worker)
        if number is not None and outcome is not None:
            found[number] = outcome
            self._losses = 0

    def _replace(self, worker: int, loss: Lost) -> None:
        self._losses += 1
        if self._losses >= _PATIENCE * self._count:
            raise WorkersLost(
                f"Policies were to be tried on {self._count} worker(s); {self._losses} in a row were lost and tried "
                f"none, the last with these words: {loss}",
                "A lost worker is replaced, and its policy tried again; but most are lost for lack of memory, and so "
                "would be the next",
                "Lower workers.count or search.batch_size, or give workers more memory; the search will go on from its "
                "last round",
            ) from loss
        self._busy[self._crew.hire(worker)] = worker, None
