"""Measured block times as prices: monotone in the granules kept, a whole number of nanoseconds for every count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MULTIPLE = 32


@dataclass(frozen=True)
class BlockTimes:
    """What the units of one shape take.

    Attributes:
        units: names of the units.
        granules: of each of them when dense.
        kept: numbers of granules that were measured, rising, the first 1 and the last ``granules``.
        milliseconds: what a unit takes with as many, one number each.
    """

    units: tuple[str, ...]
    granules: int
    kept: tuple[int, ...]
    milliseconds: tuple[float, ...]

    @property
    def price(self) -> NDArray[np.int64]:
        """int64 ``[granules + 1]``, nanoseconds of keeping 0, 1, ... granules, which never fall.

        Measured times are made monotone (:func:`isotonic`) and interpolated between. No granule costs what one does,
        since a unit keeps one at least.
        """
        monotone = isotonic(np.array(self.milliseconds)).clip(0)
        milliseconds = np.interp(np.arange(self.granules + 1), self.kept, monotone)
        price: NDArray[np.int64] = np.rint(1e6 * milliseconds).astype(np.int64)
        return price


def isotonic(values: Floats) -> Floats:
    """The non-decreasing sequence nearest to this one in squares (pool adjacent violators; Barlow et al. 1972).

    Args:
        values: float64 ``[m]``.

    Returns:
        [m] float64.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean = (mean * count + before * members) / (count + members)
            count += members
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def measured_counts(granules: int, widths: int) -> tuple[int, ...]:
    """Which numbers of granules to measure: 1, and ``widths`` evenly spaced ones up to all of them.

    Args:
        granules: of the dense unit.
        widths: how many besides 1; all numbers where there are no more.
    """
    spaced = np.arange(1, widths + 1) * granules / widths
    # Kernels like widths in multiples; an odd width would stand for its neighbours.
    multiple = _MULTIPLE if granules >= 2 * widths * _MULTIPLE else 1
    inner = np.rint(spaced[:-1] / multiple).astype(np.int64) * multiple
    return tuple(sorted({1, granules, *(int(count) for count in inner if count > 0)}))
