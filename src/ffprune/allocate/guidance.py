"""How a guided search chooses its trials (:mod:`ffprune.allocate.guided`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffprune.core.errors import ParameterError


@dataclass(frozen=True)
class Guidance:
    """How the trials of a round are chosen.

    Attributes:
        low: lowest sparsity that agent and model are to serve.
        high: highest.
        imagined: episodes that the agent trains on the model before every round.
        batch: real trials of a round.
        proposals: how many of them are the agent's.

    Raises:
        ParameterError: a range that is none, a negative count, or more proposals than a round has room for.
    """

    low: float
    high: float
    imagined: int = 64
    batch: int = 8
    proposals: int = 2

    @classmethod
    def around(cls, sparsities: Sequence[float]) -> Guidance:
        """The range of these sparsities, a little wider."""
        return cls(max(0.01, min(sparsities) - 0.05), min(0.99, max(sparsities) + 0.05))

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ParameterError(
                f"A range of sparsities from {self.low:g} to {self.high:g} was asked for",
                "It runs from above 0 to below 1, and low is less than high",
                "Change search.guide.low or search.guide.high",
            )
        if not 0 <= self.proposals < self.batch - 1:
            raise ParameterError(
                f"{self.proposals} of {self.batch} trials of a round were asked of the agent",
                f"A round also has the model's best policy and another, which leaves the agent 0 to {self.batch - 2}"
                if self.batch > 1
                else "A round has 2 trials or more: the model's best policy and another",
                "Change search.guide.batch or search.guide.proposals",
            )
        if self.imagined < 0:
            raise ParameterError(
                f"{self.imagined} imagined episodes were asked for",
                "The agent trains on 0 episodes or more before a round",
                "Raise search.guide.imagined",
            )
