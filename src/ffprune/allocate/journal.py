"""A search that goes on after a kill by replay: rewards that it was given are written down, and given again in order.

The same seed and the same rewards give the same search. So one that begins anew asks what it asked before, and needs no
state of its own kept: it is answered from the journal up to where it was killed, and from there by the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ffprune.allocate.problem import Reward
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation


@dataclass(frozen=True)
class Entry:
    """One answer of a reward, with what was asked.

    Attributes:
        kept: granules kept per unit.
        samples: what on.
        outcome: the answer.
    """

    kept: tuple[int, ...]
    samples: Samples
    outcome: Outcome


class Journal(Protocol):
    """Keeps what a reward answered, outside the outputs; particular to everything that the answers depend on.

    It is loaded before anything is written.
    """

    def load(self) -> list[Entry]:
        """Every entry that was written whole, the first first."""

    def append(self, entry: Entry) -> None:
        """Write one more; it outlives a kill from then on."""

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` entries."""


class NoJournal:
    """A :class:`Journal` that keeps nothing: a search begins anew every time."""

    def load(self) -> list[Entry]:
        """Nothing."""
        return []

    def append(self, entry: Entry) -> None:
        """Forget it."""

    def keep(self, count: int) -> None:
        """Nothing to forget."""


@dataclass
class Replayed:
    """A :class:`ffprune.allocate.problem.Reward` that answers from a journal as long as it is asked the same.

    The first question that differs makes the rest of the journal worthless, since a search goes on from its answers:
    the rest is forgotten, and from there on the reward itself is asked.

    Attributes:
        reward: what is asked where the journal ends.
        journal: of this search's earlier runs; every new answer is appended.
    """

    reward: Reward
    journal: Journal
    _left: list[Entry] = field(init=False)
    _answered: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._left = self.journal.load()[::-1]

    @property
    def most_samples(self) -> int:
        """N_max of FF Eq. 5."""
        return self.reward.most_samples

    @property
    def fixed(self) -> int:
        """Samples of a comparison."""
        return self.reward.fixed

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        """What the journal says next, and what the reward says of the rest."""
        for number, allocation in enumerate(allocations):
            past = self._next(allocation, samples)
            if past is None:
                yield from self._asked(allocations[number:], samples)
                return
            yield past

    def _next(self, allocation: Allocation, samples: Samples) -> Outcome | None:
        """The journal's answer; None where it ends, or is that of another search."""
        if not self._left:
            return None
        past = self._left.pop()
        if (past.kept, past.samples) != (allocation.kept, samples):
            self._left.clear()
            self.journal.keep(self._answered)
            return None
        self._answered += 1
        return past.outcome

    def _asked(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        outcomes = self.reward.many(allocations, samples)
        for allocation, outcome in zip(allocations, outcomes, strict=True):
            self.journal.append(Entry(allocation.kept, samples, outcome))
            self._answered += 1
            yield outcome
