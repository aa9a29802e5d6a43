"""A model of the loss of a policy: loss curves of units, corrected by what real trials found.

Each unit's curve (:mod:`ffprune.allocate.curves`) predicts what cutting it alone costs, up to a factor that its
assumptions leave open; and errors of neighbouring units add up or cancel. So the loss is taken as

    sum_i a_i c_i(k_i) + sum_i b_i sqrt(c_i(k_i) c_i+1(k_i+1)) + text,

linear in a (about a common scale), b (about 0) and the text that a trial read; a Bayesian linear regression on trials
gives their posterior. With no trial it is the curves; with many, it is the trials.

What one text makes of a policy is not what the next will: a text shifts every loss, and every unit's factor as well.
The trials of one text therefore say less together than as many trials of different texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffprune.core.units import Unit

Floats = NDArray[np.float64]

FACTOR = 0.2
"""Prior standard deviation of a unit's factor, relative to the common scale."""
PAIR = 0.1
"""Prior standard deviation of a pair's coefficient, relative to the common scale."""
TEXT = 0.3
"""Prior standard deviation of a text's offset, relative to the mean loss."""
TASTE = 0.3
"""Prior standard deviation of a unit's factor from text to text, relative to the common scale."""
NOISE = 0.03
"""Standard deviation of a trial's loss on given text, relative to the mean loss: what the model cannot express."""


class Surrogate:
    """Predicts the loss of policies, in nats a token above the dense model.

    Args:
        units: N prunable units.
        curves: per unit, float64 ``[m]``: the predicted loss at m equally spaced retentions from 0 to 1.
    """

    def __init__(self, units: Sequence[Unit], curves: Sequence[Floats]) -> None:
        self._curves = [np.asarray(curve, dtype=np.float64) for curve in curves]
        # Where each curve's points lie, in granules.
        self._points = [np.linspace(0, u.granules, len(curve)) for u, curve in zip(units, self._curves, strict=True)]
        self._pairs = len(units) - 1
        self._scale = 1.0
        self._mean = np.concatenate([np.ones(len(units)), np.zeros(self._pairs)])
        self._covariance = np.diag(self._prior_deviation() ** 2)

    def fit(self, policies: Sequence[Sequence[int]], losses: Sequence[float], texts: Sequence[int]) -> None:
        """Learn from all trials so far.

        Args:
            policies: granules kept per unit, one list a trial.
            losses: nats a token; trials without a finite loss are left out.
            texts: which text a trial read; trials of the same text are compared without its offset.
        """
        finite = np.isfinite(losses)
        if not finite.any():
            return
        y = np.asarray(losses)[finite]
        x = self.features(np.asarray(policies)[finite])
        # One factor for all units is the first thing that trials tell; the rest is learnt around it.
        single = x[:, : len(self._curves)]
        predicted = single.sum(1)
        self._scale = max(float((predicted * y).sum() / (predicted**2).sum()), 1e-12) if predicted.any() else 1.0
        level = float(np.abs(y).mean()) or 1.0
        read = np.asarray(texts)[finite]
        text = (TEXT * level) ** 2 + (TASTE * self._scale) ** 2 * (single @ single.T)
        # Covariance of the trials' losses: by the factors and pairs, by what they read, and by what is left.
        known = x * self._prior_deviation() ** 2
        covariance = known @ x.T + (read[:, None] == read) * text + (NOISE * level) ** 2 * np.eye(len(y))
        gain = np.linalg.solve(covariance, known).T
        prior = np.concatenate([np.full(len(self._curves), self._scale), np.zeros(self._pairs)])
        self._mean = prior + gain @ (y - x @ prior)
        self._covariance = np.diag(self._prior_deviation() ** 2) - gain @ known

    def predict(self, policies: Sequence[Sequence[int]] | NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the loss of policies on text like any other, float64 ``[n]`` each."""
        x = self.features(np.asarray(policies))
        return self._expected(x), np.sqrt(np.einsum("ni,ij,nj->n", x, self._covariance, x).clip(0))

    def mean(self, policies: Sequence[Sequence[int]] | NDArray[np.int64] | Floats) -> Floats:
        """The mean alone, float64 ``[n]``; of policies that may lie between two granules."""
        return self._expected(self.features(np.asarray(policies)))

    def draw(self, rng: np.random.Generator) -> list[Floats]:
        """Curves as they would be were the posterior's uncertainty settled by chance (Thompson sampling)."""
        count = len(self._curves)
        values, vectors = np.linalg.eigh(self._covariance[:count, :count])
        drawn = self._mean[:count] + vectors @ (np.sqrt(values.clip(0)) * rng.standard_normal(count))
        return self._corrected(drawn)

    @property
    def curves(self) -> list[Floats]:
        """The units' curves as corrected so far: what dynamic programming is to plan with."""
        return self._corrected(self._mean[: len(self._curves)])

    def features(self, policies: NDArray[np.int64] | Floats) -> Floats:
        """c_i(k_i) of every unit, then sqrt(c_i c_i+1) of every two neighbours, float64 ``[n, 2 N - 1]``."""
        whole = zip(policies.T, self._points, self._curves, strict=True)
        single = np.stack([np.interp(kept, points, curve) for kept, points, curve in whole], 1).clip(0)
        root = np.sqrt(single)
        return np.concatenate([single, root[:, 1:] * root[:, :-1]], 1)

    def _expected(self, features: Floats) -> Floats:
        expected: Floats = features @ self._mean
        return expected

    def _corrected(self, factors: Floats) -> list[Floats]:
        # A unit whose cut would pay is more likely a unit of which too little is known.
        lowest = 0.05 * self._scale
        return [max(factor, lowest) * curve for factor, curve in zip(factors, self._curves, strict=True)]

    def _prior_deviation(self) -> Floats:
        spread = np.concatenate([np.full(len(self._curves), FACTOR), np.full(self._pairs, PAIR)])
        return self._scale * spread
