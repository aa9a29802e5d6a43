from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.evopress import EvoPress, evopress
from ffprune.allocate.problem import Problem
from ffprune.allocate.trials import Evolved, Trial
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss, ParameterError, UnreachableSparsity
from ffprune.core.units import Allocation, Unit
from tests.allocate.matrices import Fickle, any_models, assert_inside, has_gaps, matrices
from tests.allocate.worlds import LAPS, Bandit, assert_exact, between, layers

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BOUNDS = Bounds(0.1, 1.0)
SMALL = EvoPress(offspring=6, survivors=(2, 1), fidelities=(0.5, 1.0))
GENERATION = 6 + 2 + 1


def ignore(_: Trial) -> None:
    pass


def problem(bandit: Bandit, starts: dict[str, Allocation] | None = None, step: int = 1) -> Problem:
    return Problem(UNITS, 0.3, BOUNDS, "water_fill", step, bandit, starts or {})


def run(trials: int = 10 * GENERATION, seed: int = 0, bandit: Bandit | None = None, **starts: Allocation) -> Evolved:
    return evopress(problem(bandit or Bandit(WEIGHTS), starts), SMALL, trials, seed, ignore)


def optimum() -> Allocation:
    curves = [w * np.linspace(1, 0, u.granules + 1) ** 2 for w, u in zip(WEIGHTS, UNITS, strict=True)]
    return dynamic_programming(UNITS, curves, 0.3, BOUNDS, 1)


def test_it_beats_uniform_soon_and_comes_near_the_optimum() -> None:
    bandit = Bandit(WEIGHTS)
    even, best = bandit.loss(uniform(UNITS, 0.3, BOUNDS)), bandit.loss(optimum())
    assert bandit.loss(run(60).best.allocation) < 0.7 * even
    assert bandit.loss(run(200).best.allocation) < best + 0.05 * (even - best)


def test_the_same_seed_gives_the_same_search() -> None:
    assert run(seed=3) == run(seed=3)
    assert run(seed=3).trials != run(seed=4).trials


def test_a_generation_is_thinned_out_in_rounds_of_growing_fidelity() -> None:
    bandit, told = Bandit(WEIGHTS), list[Trial]()
    found = evopress(problem(bandit), SMALL, 3 * GENERATION + 5, 0, told.append)
    assert told == found.trials
    assert [trial.number for trial in told] == list(range(3 * GENERATION))  # whole generations
    assert found.samples == 3 * (6 * 3 + 3 * 6)
    # Every round on a draw of its own; the comparison on the fixed samples.
    laps = [None] * LAPS
    assert bandit.draws == [*laps, *[0] * 6, *[1] * 3, *[2] * 6, *[3] * 3, *[4] * 6, *[5] * 3, *laps]
    parent = uniform(UNITS, 0.3, BOUNDS)
    for generation in (told[i : i + GENERATION] for i in range(0, len(told), GENERATION)):
        first, last = generation[:6], generation[6:]
        assert [trial.samples for trial in generation] == [3] * 6 + [6] * 3
        assert len({trial.allocation.kept for trial in first} | {parent.kept}) == 7
        best = sorted(first, key=lambda trial: -trial.outcome.reward)[:2]
        assert [trial.allocation for trial in last] == [parent, *(trial.allocation for trial in best)]
        parent = max(last, key=lambda trial: trial.outcome.reward).allocation
    assert found.best.allocation == parent


def test_fidelity_is_one_sample_at_least() -> None:
    found = evopress(problem(Bandit(WEIGHTS)), EvoPress(8, (4, 1), (1 / 32, 1.0)), 13, 0, ignore)
    assert [trial.samples for trial in found.trials] == [1] * 8 + [6] * 5


def test_the_parent_never_gets_worse_without_noise() -> None:
    bandit = Bandit(WEIGHTS, noise=0.0)
    found = run(bandit=bandit)
    parents = [trial.outcome.perplexity for trial in found.trials[6::GENERATION]]
    assert parents == sorted(parents, reverse=True)
    assert parents[-1] < parents[0]


def test_the_best_start_is_the_first_parent_and_a_candidate() -> None:
    even, worse = uniform(UNITS, 0.3, BOUNDS), uniform(UNITS, 0.35, BOUNDS)
    found = run(GENERATION, worse=worse, even=even)
    assert found.trials[6].allocation == even
    assert {candidate.name for candidate in found.candidates} == {"even", "worse", "last parent"}
    losses = [candidate.outcome.perplexity for candidate in found.candidates]
    assert losses == sorted(losses)
    assert found.best == found.candidates[0]


def test_a_start_off_the_budget_is_brought_on_it() -> None:
    found = run(GENERATION, heavy=uniform(UNITS, 0.2, BOUNDS))
    for trial in found.trials:
        assert_exact(trial.allocation, 0.3)


def test_the_best_start_is_returned_when_no_offspring_beats_it() -> None:
    found = run(even=uniform(UNITS, 0.3, BOUNDS), answer=optimum())
    assert (found.best.name, found.best.allocation) == ("answer", optimum())


def test_levels_of_matrices_are_equal_numbers_of_weights() -> None:
    units = matrices(2)
    task = Problem(units, 0.6, BOUNDS, "water_fill", 1, Bandit(np.ones(14)), {})
    level = round(1 / 16 * 0.4 * sum(u.params for u in units) / len(units))
    parent = np.array(uniform(units, 0.6, BOUNDS).kept)
    found = evopress(task, dataclasses.replace(SMALL, offspring=40), 43, 0, ignore)
    single = 0
    for trial in found.trials[:40]:
        moved = np.array(trial.allocation.kept) - parent
        assert moved.sum() == 0
        assert not (moved % level).any()
        assert 2 * level <= np.abs(moved).sum() <= 6 * level
        single += np.abs(moved).sum() == 2 * level
    # min of two throws of 1 to 3: one switch in five of nine.
    assert 15 <= single <= 30


def test_a_head_is_paid_for_in_channels() -> None:
    # A head is worth ten channels; a level is less than either.
    bandit = Bandit(WEIGHTS)
    settings = dataclasses.replace(SMALL, level=1e-3, offspring=30)
    parent = np.array(uniform(UNITS, 0.3, BOUNDS).kept)
    found = evopress(problem(bandit), settings, 33, 0, ignore)
    moves = [np.array(trial.allocation.kept) - parent for trial in found.trials[:30]]
    heads = [m for m in moves if np.abs(m[0::2]).sum() == 1]
    assert heads
    for move in heads:
        assert move[1::2].sum() == -10 * move[0::2].sum()


@pytest.mark.parametrize("bounds", [Bounds(0.1, 0.401), Bounds(0.399, 1.0)])
def test_a_level_ends_at_the_bounds_and_nobody_else_pays(bounds: Bounds) -> None:
    units = matrices(2)
    task = Problem(units, 0.6, bounds, "water_fill", 1, Bandit(np.ones(14)), {})
    parent = np.array(uniform(units, 0.6, bounds).kept)
    found = evopress(task, SMALL, GENERATION, 0, ignore)
    assert len(found.trials) == GENERATION
    for trial in found.trials[:6]:
        moved = np.array(trial.allocation.kept) - parent
        assert_inside(trial.allocation, bounds)
        assert moved.sum() == 0
        assert 2 <= np.count_nonzero(moved) <= 6


def test_channels_move_in_steps() -> None:
    units = layers(5, channels=64)[1::2]
    task = Problem(units, 0.25, BOUNDS, "water_fill", 8, Bandit((1, 2, 3, 4, 5)), {})
    found = evopress(task, SMALL, 6 * GENERATION, 0, ignore)
    assert len(found.trials) == 6 * GENERATION
    for trial in found.trials:
        assert not any(kept % 8 for kept in trial.allocation.kept)


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_it_ends_when_no_switch_is_left(sparsity: float) -> None:
    # Nothing to give back; or nobody to switch with.
    units = UNITS if sparsity == 0.0 else UNITS[1:2]
    task = Problem(units, sparsity, BOUNDS, "water_fill", 1, Bandit(WEIGHTS[: len(units)]), {})
    found = evopress(task, SMALL, 2 * GENERATION, 0, ignore)
    assert found.trials == []
    assert found.best.name == "uniform"


def test_a_start_wins_over_what_only_looked_better_on_the_searchs_samples() -> None:
    bandit = Fickle(WEIGHTS)
    found = run(bandit=bandit)
    assert found.best.name == "uniform"
    assert len(found.candidates) == 2
    assert found.candidates[1].outcome.perplexity > found.best.outcome.perplexity


def test_broken_trials_do_not_survive_and_nothing_finite_is_refused() -> None:
    # Every second trial, and all of one generation: then the parent stays.
    found = run(bandit=Bandit(WEIGHTS, broken=[LAPS + i for i in [*range(0, 90, 2), *range(18, 27)]]))
    assert found.best.outcome.finite
    assert found.trials[18 + 6].allocation == found.trials[27 + 6].allocation
    with pytest.raises(NonFiniteLoss, match=r"of 90 trials"):
        run(bandit=Bandit(WEIGHTS, broken=range(1000)))


@settings(deadline=None, max_examples=8)
@given(any_models, st.floats(0, 1), st.floats(0, 0.4), st.sampled_from([1, 4]), st.integers(0, 1000))
def test_every_policy_is_exact_and_inside_its_bounds(
    units: tuple[Unit, ...], share: float, low: float, step: int, seed: int
) -> None:
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    bandit = Bandit(np.random.default_rng(seed).exponential(size=len(units)))
    try:
        found = evopress(Problem(units, target, bounds, "water_fill", step, bandit, {}), SMALL, 18, seed, ignore)
    except UnreachableSparsity as refusal:
        assert "gaps" in str(refusal)
        assert has_gaps(units, bounds)
        return
    for allocation in (found.best.allocation, *(trial.allocation for trial in found.trials)):
        assert_exact(allocation, target)
        assert_inside(allocation, bounds)


def test_fewer_trials_than_a_generation_are_refused() -> None:
    assert EvoPress().trials_per_generation == 64 + 8 + 2 + 1
    with pytest.raises(ParameterError, match=r"8 trials .* One generation takes 9"):
        run(GENERATION - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"offspring": 4, "survivors": (8, 2, 1)},
        {"survivors": (8, 2, 2)},
        {"survivors": (2, 1, 1)},
        {"survivors": (2, 8, 1)},
        {"survivors": (), "fidelities": ()},
        {"survivors": (8, 1)},
        {"fidelities": (0.0, 0.5, 1.0)},
        {"fidelities": (0.1, 0.5, 1.1)},
        {"level": 0.0},
        {"level": math.nan},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as caught:
        dataclasses.replace(EvoPress(), **changes)
    for value in changes.values():
        assert re.search(re.escape(str(value)), caught.value.asked)
