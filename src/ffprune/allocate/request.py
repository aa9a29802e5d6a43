"""What an allocator is asked and answers, and what a row of the table says of it.

A row's function gets a :class:`Request` and answers with a :class:`Decision`; what it needs to know of the model
arrives as arrays (:class:`Evidence`) and as a reward, both made by the caller for the rows that ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ffprune.allocate.problem import Problem
from ffprune.allocate.search import Store
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation

Need = Literal["reward", "curves", "sensitivity", "outliers", "granule_scores", "block_rates"]
Granularity = Literal["structured", "unstructured"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What is known of the dense model, in the order of the units; None where no row asked.

    Attributes:
        curves: per unit, float64 ``[m]``: predicted loss at equally spaced retentions.
        sensitivity: float64 ``[N]``, Hessian trace over weights (MS Eq. 6).
        outliers: float64 ``[N]``, share of outliers in a unit's layer (OWL).
        granule_scores: per unit, scores of its granules' columns (FLAP).
        block_rates: unit -> learnt pruning rate (BESA).
    """

    curves: Sequence[Floats] | None = None
    sensitivity: Floats | None = None
    outliers: Floats | None = None
    granule_scores: Sequence[Floats] | None = None
    block_rates: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Looked:
    """One trial of a search, as it is shown.

    Attributes:
        reward: what the allocator was told.
        perplexity: of the pruned model; inf when it is not finite.
        sparsity: of the policy.
        retention: of every unit.
    """

    reward: float
    perplexity: float
    sparsity: float
    retention: tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """What an allocator is asked.

    Attributes:
        problem: units, target, bounds, mapping, step and reward.
        evidence: what the row needs.
        half_width: lambda of OWL or alpha of MS Alg. 1.
        trials: evaluations that a search may spend; 0 for others.
        first: sparsity and trials of the search that comes before a policy transfer; None: no transfer.
        schedule: of the curriculum, in episodes of a search of 3000.
        finalists: trials of a search that are compared at the end.
        seed: of everything random.
        store: where the search at a sparsity keeps its state.
        on_trial: told of every trial.
    """

    problem: Problem
    evidence: Evidence
    half_width: float
    trials: int
    first: tuple[float, int] | None
    schedule: Schedule
    finalists: int
    seed: int
    store: Callable[[float], Store]
    on_trial: Callable[[Looked], None]


@dataclass(frozen=True)
class Decision:
    """What an allocator answers.

    Attributes:
        allocation: the policy.
        facts: what it is worth to know of how it was found.
    """

    allocation: Allocation
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocator:
    """One row.

    Attributes:
        decide: the function.
        paper: authors and year; ``ffprune`` for our own.
        section: where it is defined.
        granularities: kinds of units that it can allocate.
        needs: what the caller must measure beforehand.
        mapping: row of :data:`ffprune.core.policy.MAPPINGS`, for agents.
        reward: row of :data:`ffprune.evaluate.reward.REWARDS`, for searches.
        transfers: whether a trained agent can go on at another sparsity.
        least_trials: fewest trials that it can search with.
        replays: whether a killed search goes on by being given its rewards again; the others use their ``store``.
    """

    decide: Callable[[Request], Decision]
    paper: str
    section: str
    granularities: tuple[Granularity, ...] = ("structured", "unstructured")
    needs: tuple[Need, ...] = ()
    mapping: str = "water_fill"
    reward: str = "perplexity_ratio"
    transfers: bool = False
    least_trials: int = 1
    replays: bool = False

    @property
    def searches(self) -> bool:
        """Whether it spends trials."""
        return "reward" in self.needs
