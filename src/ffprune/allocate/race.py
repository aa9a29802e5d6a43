"""Policies compared on the fixed samples, which no search draws from: a race that leaves losers behind.

All run on the first quarter of the samples, the better half of them, two at least, on the second as well, and the
better half of those on the rest: successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016). Policies are
compared on the same text only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ffprune.allocate.problem import Problem, Standing, distinct
from ffprune.core.errors import NonFiniteLoss
from ffprune.core.outcome import Outcome, Samples, pooled
from ffprune.core.units import Allocation

_LAPS = ((1 / 4, 2), (1 / 2, 1), (1.0, 1))
"""Share of the fixed samples up to which a lap goes, and how many policies at least go on behind it."""


@dataclass(frozen=True)
class Candidate:
    """A policy that was scored on fixed samples, at the final sparsity.

    Attributes:
        name: where it comes from: a start's name, ``agent``, ``episode 17``, ``trial 17``, ``last parent``.
        allocation: the policy.
        laps: its evaluations on the parts of the fixed samples that it came to, in order.
    """

    name: str
    allocation: Allocation
    laps: tuple[Outcome, ...]

    @property
    def outcome(self) -> Outcome:
        """Its evaluation on all samples that it came to."""
        return pooled(self.laps)


def race(
    problem: Problem, policies: Sequence[tuple[str, Allocation]], known: Sequence[Candidate] = ()
) -> list[Candidate]:
    """Compare policies: those that read all samples, best first, then those left behind, the last ones first.

    Args:
        problem: whose reward scores, on its fixed samples.
        policies: name and policy; of equal ones the first is taken.
        known: of an earlier race; what they were scored on is not asked again.
    """
    before = {candidate.allocation.kept for candidate in known}
    fresh = [(name, allocation) for name, allocation in distinct(policies) if allocation.kept not in before]
    running = [*known, *(Candidate(name, allocation, ()) for name, allocation in fresh)]
    behind: list[Candidate] = []
    # With few samples laps coincide: the later one's number holds.
    laps = {math.ceil(share * problem.reward.fixed): least for share, least in _LAPS}
    first = 0
    watch = _Watch(problem, laps)
    for lap, (end, least) in enumerate(laps.items()):
        watch.begin(lap, running)
        running = _run(problem, running, lap, Samples(end - first, None, first), watch)
        first = end
        if end < problem.reward.fixed:
            most = max(least, math.ceil(len(running) / 2))
            running, behind = running[:most], running[most:] + behind
    # A known one may have been left behind on a part of what it had read whole.
    every = [*running, *behind]
    whole = [candidate for candidate in every if len(candidate.laps) == len(laps)]
    rest = [candidate for candidate in every if len(candidate.laps) < len(laps)]
    if rest and not any(candidate.outcome.finite for candidate in whole):
        # What was left behind may be finite where all that went on overflow.
        return race(problem, (), rest) + whole
    return sorted(whole, key=lambda candidate: candidate.outcome.loss) + rest


def _run(problem: Problem, running: Sequence[Candidate], lap: int, samples: Samples, watch: _Watch) -> list[Candidate]:
    """The candidates after one more lap, best first by all laps up to it."""
    missing = [candidate for candidate in running if len(candidate.laps) == lap]
    outcomes = problem.reward.many([candidate.allocation for candidate in missing], samples)
    scored = []
    for candidate, outcome in zip(missing, outcomes, strict=True):
        scored.append(replace(candidate, laps=(*candidate.laps, outcome)))
        watch.read(samples.count, scored[-1])
    fresh = iter(scored)
    after = [next(fresh) if len(candidate.laps) == lap else candidate for candidate in running]
    return sorted(after, key=lambda candidate: pooled(candidate.laps[: lap + 1]).loss)


class _Watch:
    """Tells how far a race is.

    Args:
        problem: whose ``on_race`` is told.
        laps: samples up to which each lap goes, and how many policies at least go on behind it.
    """

    def __init__(self, problem: Problem, laps: Mapping[int, int]) -> None:
        ends = [0, *laps]
        self._tell, self._least = problem.on_race, list(laps.values())
        self._samples = [end - first for first, end in pairwise(ends)]
        self._read = self._most = 0
        self._best, self._leads = "", Outcome(0.0, math.inf, math.inf, math.inf, False, 0)

    def begin(self, lap: int, running: Sequence[Candidate]) -> None:
        """A lap begins; nothing is told before there is something to read."""
        left, field = 0, len(running)
        for later in range(lap, len(self._samples)):
            # Who will go on is not known; as many as go on, but not more than have not read this yet.
            left += self._samples[later] * min(field, sum(len(candidate.laps) <= later for candidate in running))
            field = min(field, max(self._least[later], math.ceil(field / 2)))
        starts, self._most, self._best = not self._most, self._read + left, ""
        if left or not starts:
            self._tell(Standing(self._read, self._most, starts=starts))

    def read(self, samples: int, candidate: Candidate) -> None:
        """A policy has read this lap's samples."""
        self._read += samples
        if not self._best or candidate.outcome.loss < self._leads.loss:
            self._best, self._leads = candidate.name, candidate.outcome
        self._tell(Standing(self._read, self._most, self._best, self._leads.perplexity))


def compare(
    problem: Problem, found: Sequence[tuple[str, Allocation]], known: Sequence[Candidate], trials: int
) -> list[Candidate]:
    """Compare what a search found with what was known before; best first.

    Args:
        problem: whose reward scores.
        found: name and policy.
        known: of an earlier race.
        trials: how many trials the search had.

    Raises:
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    candidates = race(problem, found, known)
    if not candidates[0].outcome.finite:
        raise NonFiniteLoss(
            f"A policy of sparsity {problem.sparsity} was asked for; none of {len(candidates)} candidates of "
            f"{trials} trials has a finite loss",
            "A policy is known by its perplexity, which must be a finite number",
            "Change compute.dtype to float32 or bfloat16, raise levels.damping, or lower the sparsity",
        )
    return candidates
