from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.evolution import Evolution, eas
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
SMALL = Evolution(population=12, survivors=4, mutated=6, crossed=4, probability=0.3)


def ignore(_: Trial) -> None:
    pass


def problem(bandit: Bandit, starts: dict[str, Allocation] | None = None) -> Problem:
    return Problem(UNITS, 0.3, BOUNDS, "water_fill", 1, bandit, starts or {})


def run(trials: int = 60, seed: int = 0, bandit: Bandit | None = None, **starts: Allocation) -> Evolved:
    return eas(problem(bandit or Bandit(WEIGHTS), starts), SMALL, trials, seed, ignore)


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


def test_every_trial_is_new_on_budget_at_full_fidelity_and_told() -> None:
    bandit, told = Bandit(WEIGHTS), list[Trial]()
    found = eas(problem(bandit), SMALL, 50, 0, told.append)
    assert told == found.trials
    assert [trial.number for trial in told] == list(range(50))
    assert len({trial.allocation.kept for trial in told}) == 50
    for trial in told:
        assert_exact(trial.allocation, 0.3)
        assert_inside(trial.allocation, BOUNDS)
        assert trial.samples == bandit.most_samples
    assert found.samples == 50 * bandit.most_samples
    # All of the search on one draw, the comparison on the fixed samples.
    assert bandit.draws == [*[None] * LAPS, *[0] * 50, *[None] * LAPS]


def test_starts_are_part_of_the_first_generation_and_of_the_comparison() -> None:
    even, off_budget = uniform(UNITS, 0.3, BOUNDS), uniform(UNITS, 0.4, BOUNDS)
    found = run(30, even=even, off_budget=off_budget)
    assert found.trials[0].allocation == even
    assert_exact(found.trials[1].allocation, 0.3)
    assert {candidate.name for candidate in found.candidates} >= {"even", "off_budget"}
    losses = [candidate.outcome.perplexity for candidate in found.candidates]
    assert losses == sorted(losses)
    assert found.best == found.candidates[0]


def test_the_best_start_is_returned_when_no_trial_beats_it() -> None:
    found = run(30, even=uniform(UNITS, 0.3, BOUNDS), answer=optimum())
    assert (found.best.name, found.best.allocation) == ("answer", optimum())


def test_the_best_trial_is_the_answer() -> None:
    found = run(60)
    best = max(found.trials, key=lambda trial: trial.outcome.reward)
    assert (found.best.name, found.best.allocation) == (f"trial {best.number}", best.allocation)


def test_only_the_best_have_children() -> None:
    # Without fresh draws and with crossover alone, later policies take every unit from a survivor (but for repair).
    units = matrices(1, (1000,) * 7)
    bandit = Bandit(range(1, 8), noise=0.0)
    crossing = Evolution(population=8, survivors=2, mutated=0, crossed=8)
    found = eas(Problem(units, 0.5, BOUNDS, "water_fill", 1, bandit, {}), crossing, 16, 0, ignore)
    survivors = sorted(found.trials[:8], key=lambda trial: -trial.outcome.reward)[:2]
    a, b = (np.array(trial.allocation.retention) for trial in survivors)
    for trial in found.trials[8:]:
        child = np.array(trial.allocation.retention)

        def strangers(shift: float, child: np.ndarray = child) -> int:
            offs = [abs(child - np.clip(parent + shift, 0.1, 1.0)) for parent in (a, b)]
            return int((np.minimum(*offs) > 2e-3).sum())

        # The repair shifts all units alike, as far as the bounds allow.
        assert min(strangers(shift) for shift in (*(child - a), *(child - b))) == 0, trial.number


def test_it_ends_when_nothing_new_is_left() -> None:
    units = (Unit("layers.0.attention", "attention", 0, 3, 40), Unit("layers.0.ffn", "ffn", 0, 30, 40))
    task = Problem(units, 0.3, BOUNDS, "water_fill", 1, Bandit((1.0, 1.0)), {})
    found = eas(task, SMALL, 100, 0, ignore)
    # One to three groups: three policies are on the budget.
    assert {trial.allocation.kept for trial in found.trials} == {(1, 22), (2, 21), (3, 20)}


def test_a_start_wins_over_what_only_looked_better_on_the_searchs_samples() -> None:
    bandit = Fickle(WEIGHTS)
    found = run(60, bandit=bandit)
    assert found.best.name == "uniform"
    assert len(found.candidates) == 2
    assert found.candidates[1].outcome.perplexity > found.best.outcome.perplexity


def test_broken_trials_do_not_survive_and_nothing_finite_is_refused() -> None:
    bandit = Bandit(WEIGHTS, broken=range(LAPS, LAPS + 60, 2))
    found = run(60, bandit=bandit)
    assert found.best.outcome.finite
    assert sum(not trial.outcome.finite for trial in found.trials) == 30
    with pytest.raises(NonFiniteLoss, match=r"of 60 trials has a finite"):
        run(60, bandit=Bandit(WEIGHTS, broken=range(1000)))


@settings(deadline=None, max_examples=8)
@given(any_models, st.floats(0, 1), st.floats(0, 0.4), st.sampled_from([1, 4]), st.integers(0, 1000))
def test_every_policy_is_exact_and_inside_its_bounds(
    units: tuple[Unit, ...], share: float, low: float, step: int, seed: int
) -> None:
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    bandit = Bandit(np.random.default_rng(seed).exponential(size=len(units)))
    try:
        found = eas(Problem(units, target, bounds, "water_fill", step, bandit, {}), SMALL, 14, seed, ignore)
    except UnreachableSparsity as refusal:
        assert "gaps" in str(refusal)
        assert has_gaps(units, bounds)
        return
    for allocation in (found.best.allocation, *(trial.allocation for trial in found.trials)):
        assert_exact(allocation, target)
        assert_inside(allocation, bounds)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"survivors": 0}, "0 survivors"),
        ({"mutated": 40, "crossed": 11}, "40 mutated and 11 crossed"),
        ({"mutated": 0, "crossed": 0}, "1 child or more"),
        ({"mutated": -1}, "-1 mutated"),
        ({"probability": 0.0}, "probability 0.0"),
        ({"probability": 1.5}, "probability 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(said)):
        dataclasses.replace(Evolution(), **changes)
