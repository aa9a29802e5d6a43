from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from ffprune.allocate.surrogate import FACTOR, NOISE, PAIR, TASTE, TEXT, Surrogate
from tests.allocate.worlds import layers

UNITS = layers(3)
CURVES = [np.linspace(1, 0, unit.granules + 1) ** 2 * (i + 1) for i, unit in enumerate(UNITS)]


def policies(count: int, seed: int = 0) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, unit.granules + 1, count) for unit in UNITS], 1)


def losses(kept: NDArray[np.int64], factors: NDArray[np.float64], pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The model, term by term."""
    found = np.zeros(len(kept))
    for row, policy in enumerate(kept):
        cost = [curve[k] for curve, k in zip(CURVES, policy, strict=True)]
        found[row] = sum(a * c for a, c in zip(factors, cost, strict=True))
        found[row] += sum(b * (x * y) ** 0.5 for b, x, y in zip(pairs, cost[:-1], cost[1:], strict=True))
    return found


def test_without_trials_it_is_the_sum_of_curves() -> None:
    kept = policies(20)
    means, deviations = Surrogate(UNITS, CURVES).predict(kept)
    np.testing.assert_allclose(means, losses(kept, np.ones(6), np.zeros(5)))
    expected = [
        (sum((FACTOR * c) ** 2 for c in cost) + sum(PAIR**2 * x * y for x, y in pairwise(cost)))
        for cost in ([curve[k] for curve, k in zip(CURVES, policy, strict=True)] for policy in kept)
    ]
    np.testing.assert_allclose(deviations, np.sqrt(expected))


def test_it_finds_the_law_behind_many_trials() -> None:
    rng = np.random.default_rng(1)
    factors, pairs = rng.uniform(0.5, 2, 6), rng.normal(0, 0.2, 5)
    kept, other = policies(300), policies(30, 9)
    texts = np.arange(300) // 30
    seen = losses(kept, factors, pairs) + rng.normal(0, 0.3, 10)[texts]
    model = Surrogate(UNITS, CURVES)
    model.fit(kept.tolist(), seen.tolist(), texts.tolist())
    means, deviations = model.predict(other)
    truth = losses(other, factors, pairs)
    assert np.abs(means - truth).max() < 0.1 * truth.mean()
    assert (np.abs(means - truth) < 5 * deviations + 0.05).all()
    for corrected, curve, factor in zip(model.curves, CURVES, factors, strict=True):
        np.testing.assert_allclose(corrected, curve * factor, atol=0.15 * curve.max())


def test_its_posterior_is_that_of_the_normal_equations() -> None:
    """The twin: the posterior mean in plain algebra, with the prior around the common scale."""
    rng = np.random.default_rng(2)
    kept, texts = policies(12), np.repeat([0, 1], 6)
    seen = losses(kept, rng.uniform(0.5, 2, 6), np.zeros(5)) + 0.1 * texts
    model = Surrogate(UNITS, CURVES)
    model.fit(kept.tolist(), seen.tolist(), texts.tolist())
    x = model.features(kept)
    single = x[:, :6].sum(1)
    scale, level = float(single @ seen / (single @ single)), float(np.abs(seen).mean())
    # Each text has an offset of its own, and what it adds to every unit's factor.
    tastes = [x[:, :6] * (texts == text)[:, None] for text in (0, 1)]
    design = np.concatenate([x, np.eye(2)[texts], *tastes], 1)
    prior = np.concatenate([np.full(6, scale), np.zeros(7 + 12)])
    widths = (6, FACTOR * scale), (5, PAIR * scale), (2, TEXT * level), (12, TASTE * scale)
    spread = np.concatenate([np.full(count, width) for count, width in widths])
    left = design.T @ design / (NOISE * level) ** 2 + np.diag(spread**-2)
    right = design.T @ seen / (NOISE * level) ** 2 + prior / spread**2
    np.testing.assert_allclose(model.predict(kept)[0], x @ np.linalg.solve(left, right)[:11], rtol=1e-6)


def test_draws_surround_the_curves_and_close_in_on_them() -> None:
    def spread(model: Surrogate) -> float:
        rng = np.random.default_rng(3)
        drawn = np.array([[curve[0] for curve in model.draw(rng)] for _ in range(200)])
        centre = np.array([curve[0] for curve in model.curves])
        np.testing.assert_allclose(drawn.mean(0), centre, rtol=0.3)
        return float((drawn.std(0) / centre).mean())

    model = Surrogate(UNITS, CURVES)
    before = spread(model)
    kept = policies(100)
    seen = losses(kept, np.ones(6), np.zeros(5)).tolist()
    model.fit(kept.tolist(), seen, [0] * 100)
    of_one_text = spread(model)
    assert of_one_text > 0.6 * before  # the next text may like other units
    model.fit(kept.tolist(), seen, list(range(100)))
    assert spread(model) < 0.9 * of_one_text
    assert before == pytest.approx(FACTOR, rel=0.2)


def test_broken_trials_teach_nothing() -> None:
    model, clean = Surrogate(UNITS, CURVES), Surrogate(UNITS, CURVES)
    kept = policies(10)
    seen = losses(kept, np.full(6, 2.0), np.zeros(5))
    clean.fit(kept[1:].tolist(), seen[1:].tolist(), [0] * 9)
    model.fit(kept.tolist(), [np.inf, *seen[1:].tolist()], [0] * 10)
    np.testing.assert_allclose(model.predict(kept)[0], clean.predict(kept)[0])
    untouched = Surrogate(UNITS, CURVES)
    untouched.fit(kept.tolist(), [np.inf] * 10, [0] * 10)
    np.testing.assert_allclose(untouched.predict(kept)[0], Surrogate(UNITS, CURVES).predict(kept)[0])
