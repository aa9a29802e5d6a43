"""Blockwise parameter-efficient sparsity allocation (BESA, Xu et al., ICLR 2024): pruning rates learnt by gradient.

Inside one decoder layer every matrix has a distribution over candidate pruning rates, whose mean is its rate. The
layer's output error is differentiable in it by a straight-through mask, and pulls weights to where they matter, while
a penalty holds the layer at its target. No model is imported: a layer is known by its matrices' order of removal and
by a function from masks to an error (``models/masked_block.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss, ParameterError
from ffprune.core.rounding import to_allocation
from ffprune.core.units import Allocation, Unit

Error = Callable[[Mapping[str, Tensor]], Tensor]
"""role -> mask, float32 ``[out, in]``; the answer is the layer's relative output error on one batch, a scalar."""


@dataclass(frozen=True)
class Settings:
    """How rates are learnt.

    Attributes:
        candidates: D; candidate rates are 0, 1/D ... 1.
        penalty: weight of (sparsity - target)^2 beside the relative output error. 5 is the published code's, whose
            deviation is relative to the target.
        learning_rate: of Adam; a step moves a rate by about a quarter of it at most, so it goes with the steps.
        epochs: passes over the batches; 1 in the paper.
    """

    candidates: int = 100
    penalty: float = 5.0
    learning_rate: float = 0.02
    epochs: int = 1


@dataclass(frozen=True)
class BlockRates:
    """What was learnt of one layer.

    Attributes:
        rates: role -> pruning rate, share of the matrix's weights that go.
        sparsity: of the whole layer at these rates.
        errors: relative output error at every step, before that step.
    """

    rates: dict[str, float]
    sparsity: float
    errors: list[float]


class LearnableRate:
    """The pruning rate of one matrix, as the mean of a distribution over candidate rates.

    Args:
        ranks: integer ``[out, in]``, see :func:`learn_rates`.
        candidates: D.
        sparsity: the rate at first.

    Attributes:
        logits: float32 ``[D + 1]``, whose softmax is beta, the weight of every candidate.
    """

    def __init__(self, ranks: Tensor, candidates: int, sparsity: float) -> None:
        self._ranks = ranks
        self._candidates = torch.arange(candidates + 1, device=ranks.device) / candidates
        self._positions = torch.arange(ranks.shape[1], device=ranks.device)
        # [D + 1, in]: whether a candidate keeps the weight at this rank.
        kept = torch.round((1 - self._candidates) * ranks.shape[1])
        self._keeps = (self._positions < kept[:, None]).float()
        self.logits = _on_target(self._candidates, sparsity).requires_grad_()

    def rate_and_mask(self) -> tuple[Tensor, Tensor]:
        """alpha = sum beta_d p_d, scalar, and the mask at that rate, float32 ``[out, in]``, both differentiable."""
        beta = self.logits.softmax(0)
        rate = beta @ self._candidates
        # 1 - the cumulated beta: the probability to stay, by rank.
        stays = beta @ self._keeps
        kept = torch.round((1 - rate.detach()) * len(self._positions))
        by_rank = (self._positions < kept).float() + stays - stays.detach()
        return rate, by_rank.expand(self._ranks.shape).gather(1, self._ranks.long())


def learn_rates(
    ranks: Mapping[str, Tensor], errors: Sequence[Error], sparsity: float, settings: Settings | None = None
) -> BlockRates:
    """Learn the pruning rate of every matrix of one layer (BESA section 3.2, layer-wise variant).

    As in the published code the mask removes the same count of every row, round(rate * in), where the paper
    thresholds the probabilities. The start is the widest distribution (that of greatest entropy) with the target as
    its mean: at 50% the uniform one of the published code, which has to find any other target first. Nothing is
    random: the same inputs give the same rates.

    Args:
        ranks: role -> integer ``[out, in]``, each row a permutation, 0 the weight that goes last
            (:func:`ffprune.core.masks.ranks`, scope ``row``).
        errors: the relative output error as a function of the masks, one function a calibration batch.
        sparsity: target of the layer, removed / all its weights.
        settings: of the learning; None: the defaults.

    Raises:
        ParameterError: ``sparsity`` is not between 0 and 1.
        NonFiniteLoss: an output error is not finite.
    """
    if not 0 < sparsity < 1:
        raise ParameterError(
            f"BESA was asked for sparsity {sparsity}",
            "A rate is learnt around a target strictly between 0 and 1",
            "Change the sparsity",
        )
    settings = settings or Settings()
    total = sum(order.numel() for order in ranks.values())
    matrices = {role: LearnableRate(order, settings.candidates, sparsity) for role, order in ranks.items()}
    logits = [matrix.logits for matrix in matrices.values()]
    optimizer = torch.optim.Adam(logits, lr=settings.learning_rate)
    log = []
    for error in list(errors) * settings.epochs:
        with torch.enable_grad():
            found = {role: matrix.rate_and_mask() for role, matrix in matrices.items()}
            achieved = torch.stack([rate * ranks[role].numel() for role, (rate, _) in found.items()]).sum() / total
            lost = error({role: mask for role, (_, mask) in found.items()})
            loss = lost.float() + settings.penalty * (achieved - sparsity) ** 2
        log.append(float(lost.detach()))
        if not np.isfinite(log[-1]):
            raise NonFiniteLoss(
                f"the output error of a layer pruned by {float(achieved.detach()):.3f} is not finite",
                "Rates are learnt from finite errors",
                "Load the model as float32 or bfloat16",
            )
        optimizer.zero_grad()
        # Only these: the error may run through weights that ask for gradients too.
        loss.backward(inputs=logits)  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        rates = {role: float(matrix.rate_and_mask()[0]) for role, matrix in matrices.items()}
    return BlockRates(rates, sum(rate * ranks[role].numel() for role, rate in rates.items()) / total, log)


def besa(units: Sequence[Unit], rates: Mapping[str, float], sparsity: float, bounds: Bounds) -> Allocation:
    """The allocation of learnt rates, on the exact budget.

    Penalties hold the layers near the target, not on it: one shift common to all matrices does the rest.

    Args:
        units: matrices (kind ``weight``).
        rates: unit name -> pruning rate.
        sparsity: target, removed / all cost.
        bounds: retention bounds.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
    """
    retentions = np.array([1 - rates[unit.name] for unit in units])
    return to_allocation(retentions, retentions, units, sparsity, bounds)


def _on_target(candidates: Tensor, sparsity: float) -> Tensor:
    """float32 ``[D + 1]``: logits t * p_d, with the t for which the softmax has mean ``sparsity``.

    The mean grows with t, which makes bisection safe.
    """
    grid = candidates.double()
    below, above = -1e4, 1e4
    for _ in range(64):
        tilt = (below + above) / 2
        if float((tilt * grid).softmax(0) @ grid) < sparsity:
            below = tilt
        else:
            above = tilt
    return (above * grid).float()
