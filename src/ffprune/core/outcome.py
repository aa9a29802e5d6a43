"""What one evaluation of a policy gave: the words that a search and a reward share."""

from __future__ import annotations

from dataclasses import dataclass


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
