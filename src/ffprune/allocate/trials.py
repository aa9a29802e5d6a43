"""What the evolutionary searches share: trials, the starts they begin from, and the comparison that ends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate, compare, race
from ffprune.allocate.uniform import uniform
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.rounding import Floats, to_allocation
from ffprune.core.units import Allocation


@dataclass(frozen=True)
class Trial:
    """One evaluation that a search spent.

    Attributes:
        number: 0-based position in the search.
        allocation: the policy, on the exact budget.
        samples: fidelity of this evaluation.
        outcome: what it gave.
    """

    number: int
    allocation: Allocation
    samples: int
    outcome: Outcome


@dataclass(frozen=True)
class Evolved:
    """What an evolutionary search found.

    Attributes:
        best: the candidate with the lowest perplexity on the fixed samples.
        candidates: the starts and the search's own answer, compared on the fixed samples, best first.
        trials: every trial; the comparison on the fixed samples is not among them.
    """

    best: Candidate
    candidates: list[Candidate]
    trials: list[Trial]

    @property
    def samples(self) -> int:
        """Samples that all trials read together: what the search cost, whatever its fidelities."""
        return sum(trial.samples for trial in self.trials)


@dataclass
class Laboratory:
    """Runs trials and keeps them.

    Attributes:
        problem: whose reward is asked.
        on_trial: told of every trial as it ends.
        trials: every trial so far.
    """

    problem: Problem
    on_trial: Callable[[Trial], None]
    trials: list[Trial] = field(default_factory=list)

    def test(self, allocations: Sequence[Allocation], samples: int, draw: int) -> list[Trial]:
        """Spend an evaluation on each of these policies, all on the same samples."""
        outcomes = self.problem.reward.many(allocations, Samples(samples, draw))
        for allocation, outcome in zip(allocations, outcomes, strict=True):
            trial = Trial(len(self.trials), allocation, samples, outcome)
            self.trials.append(trial)
            self.on_trial(trial)
        return self.trials[len(self.trials) - len(allocations) :]


def best_first(trials: list[Trial]) -> list[Trial]:
    """By falling reward; among equals, the earlier in the list."""
    return sorted(trials, key=lambda trial: -trial.outcome.reward)


def on_budget(problem: Problem, retentions: Floats) -> Allocation:
    """The nearest policy on the exact budget: how off-budget children are repaired.

    Args:
        problem: units, target, bounds and step.
        retentions: float64 ``[N]``, shares kept.

    Raises:
        UnreachableSparsity: see :func:`ffprune.core.rounding.to_allocation`.
    """
    return to_allocation(retentions, retentions, problem.units, problem.sparsity, problem.bounds, problem.step)


def scored_starts(problem: Problem) -> list[Candidate]:
    """The known policies on the fixed samples, best first; the uniform one where none is known.

    Raises:
        UnreachableSparsity: none is known, and no allocation inside the bounds has this sparsity.
    """
    starts = problem.starts or {"uniform": uniform(problem.units, problem.sparsity, problem.bounds)}
    return race(problem, list(starts.items()))


def conclude(
    problem: Problem, starts: list[Candidate], found: list[tuple[str, Allocation]], trials: list[Trial]
) -> Evolved:
    """Compare what a search found with its starts on the fixed samples at full fidelity; the best wins.

    Args:
        problem: whose reward is asked.
        starts: of :func:`scored_starts`.
        found: the search's own answers, each with the name of where it comes from.
        trials: every trial.

    Raises:
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    candidates = compare(problem, found, starts, len(trials))
    return Evolved(candidates[0], candidates, trials)
