"""The progressive schedule: easy targets and cheap evaluations first (FF 2.2, Eq. 3-5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ffprune.core.errors import ParameterError


@dataclass(frozen=True)
class Schedule:
    """alpha(t), which drives both the target sparsity and the evaluation's fidelity.

    Attributes:
        alpha_start: value alpha rises from, in [0, 1].
        k: steepness, per episode.
        t0: midpoint, in episodes.

    Raises:
        ParameterError: alpha_start outside [0, 1], or k not positive.
    """

    alpha_start: float
    k: float
    t0: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_start <= 1:
            raise ParameterError(
                f"schedule.alpha_start {self.alpha_start} was asked for",
                "It is a share of the final sparsity, 0 to 1",
                "Change schedule.alpha_start",
            )
        if not self.k > 0:
            raise ParameterError(
                f"schedule.k {self.k} was asked for",
                "The schedule rises only with a steepness above 0",
                "Raise schedule.k",
            )

    @classmethod
    def scaled(cls, alpha_start: float, k: float, t0: float, *, episodes: int, paper_episodes: int = 3000) -> Schedule:
        """The schedule of a search of another length, each phase keeping its share of it (METHODS 3).

        Args:
            alpha_start: value alpha rises from, in [0, 1].
            k: steepness per episode in a search of ``paper_episodes``.
            t0: midpoint, in episodes, in a search of ``paper_episodes``.
            episodes: length of this search.
            paper_episodes: length the numbers are meant for (3000 in SS).

        Returns:
            A schedule whose ``alpha(share * episodes)`` is the paper's ``alpha(share * paper_episodes)``.

        Raises:
            ParameterError: either length is below 1, or see the class.
        """
        if episodes < 1 or paper_episodes < 1:
            raise ParameterError(
                f"a schedule for {episodes} episodes scaled from {paper_episodes} was asked for",
                "Searches have 1 episode or more",
                "Raise the number of episodes",
            )
        return cls(alpha_start, k * paper_episodes / episodes, t0 * episodes / paper_episodes)

    def alpha(self, t: float) -> float:
        """alpha_start + (1 - alpha_start) / (1 + exp(-k (t - t0))), rising (FF Eq. 3).

        Eq. 3 prints ``exp(-k (t0 - t))``, which falls with t (METHODS 3). alpha(0) is slightly more than
        alpha_start (by 0.7% of the way at k = 0.01, t0 = 500), and alpha only approaches 1: the last
        episodes aim a hair below the final target, so a search re-scores its candidates at that target.

        Args:
            t: episode, from 0.

        Returns:
            A share in [alpha_start, 1].
        """
        # The logistic function by way of tanh, which cannot overflow on a steep schedule.
        rise = (1 + math.tanh(self.k * (t - self.t0) / 2)) / 2
        return self.alpha_start + (1 - self.alpha_start) * rise

    def sparsity_at(self, t: float, final: float) -> float:
        """Target sparsity of episode t: sigma_t = S_final * alpha(t) (FF Eq. 4).

        Args:
            t: episode, from 0.
            final: S_final, removed / prunable parameters.
        """
        return final * self.alpha(t)

    def samples_at(self, t: float, n_max: int) -> int:
        """Evaluation samples of episode t: max(1, round(N_max * alpha(t))) (FF Eq. 5, METHODS 3).

        Args:
            t: episode, from 0.
            n_max: N_max, samples at full fidelity.
        """
        return max(1, round(n_max * self.alpha(t)))
