"""Rewards of a search: what the really pruned model predicts on a draw of validation windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.errors import NonFiniteLoss, TooLittleText
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation
from ffprune.evaluate.divergence import Teacher
from ffprune.evaluate.perplexity import token_nll

DENSE_BYTES = 1 << 29
"""Of the dense model's predictions that are kept; beyond, those on the fixed windows and on the present draw stay."""

REWARDS: dict[str, Callable[[float, float, float], float]] = {
    # FF Eq. 2.
    "perplexity_ratio": lambda pruned, dense, divergence: dense / pruned,
    # SS, Reward Function.
    "inverse_perplexity": lambda pruned, dense, divergence: 10 / pruned,
    # The ratio of perplexities that the divergence would be, were the dense model's predictions the text.
    "divergence": lambda pruned, dense, divergence: math.exp(-divergence),
}
"""(perplexity of the pruned model, of the dense model, KL from it in nats a token) -> reward."""


@dataclass
class ModelReward:
    """Evaluates allocations on windows of validation text.

    The first ``fixed`` windows are the fixed samples of final comparisons; trials draw from the others, so that a
    policy picked for its luck on the trials' text must prove itself on text the agent never saw.

    Attributes:
        model: the model that ``apply`` sets allocations on.
        apply: makes the model compute with an allocation.
        dense: the allocation that keeps everything.
        windows: int64 ``[n, seqlen]``, validation windows.
        kind: row of :data:`REWARDS`.
        trial_samples: windows of a trial at full fidelity (N_max of FF Eq. 5).
        fixed: windows of a final comparison.
        batch_size: windows a forward pass.
        threads: processor threads of a trial. Rounding depends on the number (in bfloat16 a loss moved by 0.2%), so it
            is the trial's own, whatever the process that it runs in has.
        seed: of the draws.
    """

    model: PreTrainedModel
    apply: Callable[[Allocation], None]
    dense: Allocation
    windows: Tensor
    kind: str
    trial_samples: int
    fixed: int
    batch_size: int
    threads: int
    seed: int
    _dense_nll: dict[int, float] = field(default_factory=dict)
    _known: dict[tuple[tuple[int, ...], tuple[int, ...]], Outcome] = field(default_factory=dict)
    _teacher: Teacher | None = None

    def __post_init__(self) -> None:
        look_up(REWARDS, self.kind, "search.reward")
        if self.kind == "divergence":
            self._teacher = Teacher()
        if self.fixed + self.trial_samples > len(self.windows):
            raise TooLittleText(
                f"{self.fixed} windows for comparisons and {self.trial_samples} for trials were asked for",
                f"The validation text has {len(self.windows)} windows of {self.windows.shape[1]} tokens",
                "Lower search.final_samples, search.samples or search.seqlen, or give more validation text",
            )

    @property
    def most_samples(self) -> int:
        """N_max of FF Eq. 5."""
        return self.trial_samples

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        """Score an allocation on windows of one draw, or on fixed windows.

        The same policy on the same windows is not run twice.
        """
        chosen = self._choose(samples)
        key = allocation.kept, tuple(chosen)
        if key not in self._known:
            with _on_threads(self.threads):
                self._known[key] = self._score(allocation, chosen)
        return self._known[key]

    def many(self, allocations: Sequence[Allocation], samples: Samples) -> Iterator[Outcome]:
        """One after the other, each when it is asked for: what a kill finds is what was told."""
        return (self(allocation, samples) for allocation in allocations)

    def _score(self, allocation: Allocation, chosen: list[int]) -> Outcome:
        dense = self._dense_mean(chosen)
        self.apply(allocation)
        divergence = 0.0
        if self._teacher is None:
            nll = token_nll(self.model, self.windows[chosen], self.batch_size)
        else:
            kl, nll = self._teacher.compare(self.model, chosen, self.windows[chosen], self.batch_size)
            divergence = float(kl.double().mean())
        mean = float(nll.double().mean())
        tokens = len(chosen) * (self.windows.shape[1] - 1)
        # exp overflows beyond this, and no model that bad is worth telling from another.
        if not math.isfinite(mean + divergence) or mean > 700:
            return Outcome(0.0, math.inf, math.inf, math.exp(dense), False, tokens)
        return Outcome(
            reward=REWARDS[self.kind](math.exp(mean), math.exp(dense), divergence),
            loss=mean - dense if self._teacher is None else divergence,
            perplexity=math.exp(mean),
            dense_perplexity=math.exp(dense),
            finite=True,
            tokens=tokens,
        )

    def _choose(self, samples: Samples) -> list[int]:
        if samples.draw is None:
            return list(range(samples.first, min(samples.first + samples.count, self.fixed)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + samples.draw)
        pool = torch.randperm(len(self.windows) - self.fixed, generator=generator)[: samples.count] + self.fixed
        return [int(i) for i in pool]

    def _dense_mean(self, chosen: list[int]) -> float:
        missing = [i for i in chosen if i not in self._dense_nll or not self._remembers(i)]
        if missing:
            if self._teacher is not None and self._teacher.nbytes > DENSE_BYTES:
                self._teacher.keep({*range(self.fixed), *chosen})
            self.apply(self.dense)
            if self._teacher is None:
                # One at a time: in half precision a window's loss depends on those beside it in its batch, and which
                # are missing depends on what was asked before. A search that was killed must not notice.
                nll = token_nll(self.model, self.windows[missing], 1)
            else:
                nll = torch.stack([self._teacher.learn(self.model, i, self.windows[i]) for i in missing])
            losses = nll.double().mean(1)
            if not torch.isfinite(losses).all():
                raise NonFiniteLoss(
                    "the dense model's loss on the validation text is not finite",
                    "every reward is relative to the dense model",
                    "Change compute.dtype to float32 or bfloat16, or check the model",
                )
            self._dense_nll |= dict(zip(missing, losses.tolist(), strict=True))
        return sum(self._dense_nll[i] for i in chosen) / len(chosen)

    def _remembers(self, window: int) -> bool:
        return self._teacher is None or self._teacher.knows(window)


@contextmanager
def _on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
