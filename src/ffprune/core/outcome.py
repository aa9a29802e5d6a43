"""What a policy is evaluated on, and what that gave: the words that a search and a reward share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """What a policy is evaluated on.

    Attributes:
        count: how many samples (fidelity; N of FF Eq. 5).
        draw: which random draw; equal draws give equal samples, so that the policies of one update are compared on the
            same text. None: the fixed samples, which are not drawn from.
        first: of the fixed samples, the first one.
    """

    count: int
    draw: int | None
    first: int = 0


@dataclass(frozen=True)
class Outcome:
    """One evaluated policy.

    Attributes:
        reward: the agent's reward; 0 when the loss was not finite.
        loss: what policies are compared by, in nats a token above the dense model: the logarithm of the ratio of
            perplexities, or the divergence from the dense model; infinite when it was not finite.
        perplexity: of the pruned model on the samples; infinite when the loss was not finite.
        dense_perplexity: of the dense model on the same samples.
        finite: whether the loss was finite.
        tokens: tokens scored.
    """

    reward: float
    loss: float
    perplexity: float
    dense_perplexity: float
    finite: bool
    tokens: int


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome on all of several samples together, of one policy.

    Every reward is the exponential of a mean over tokens (:data:`ffprune.evaluate.reward.REWARDS`), so that rewards
    pool, as perplexities do, by their geometric mean.

    Args:
        outcomes: one or more, of samples that share no text.
    """
    tokens = sum(outcome.tokens for outcome in outcomes)
    shares = [outcome.tokens / tokens for outcome in outcomes]

    def over_all(values: Sequence[float]) -> float:
        return math.prod(math.pow(value, share) for value, share in zip(values, shares, strict=True))

    return Outcome(
        reward=over_all([outcome.reward for outcome in outcomes]),
        loss=sum(outcome.loss * share for outcome, share in zip(outcomes, shares, strict=True)),
        perplexity=over_all([outcome.perplexity for outcome in outcomes]),
        dense_perplexity=over_all([outcome.dense_perplexity for outcome in outcomes]),
        finite=all(outcome.finite for outcome in outcomes),
        tokens=tokens,
    )
