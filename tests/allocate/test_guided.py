"""The guided search in a world whose units matter otherwise than their curves say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ffprune.allocate.agent import Preset
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.guided import GuidedResult, guided, taught
from ffprune.allocate.problem import Problem
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss, ParameterError, UnreachableSparsity
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation
from tests.allocate.test_search import Memory
from tests.allocate.worlds import Bandit, assert_exact, layers

UNITS = layers(3)
BOUNDS = Bounds(0.1, 1.0)
CURVES = [(1 - np.linspace(0, 1, unit.granules + 1)) ** 2 for unit in UNITS]
WEIGHTS = (1.0, 0.6, 1.8, 1.4, 0.7, 1.0)
SMALL = Preset((8,), (8,), 3e-3, 0.2, 8, 2, 0.1)
GUIDANCE = Guidance(0.2, 0.4, imagined=8, batch=6, proposals=2)
FLAT = Schedule(1.0, 1.0, 0.0)


def problem(bandit: Bandit, sparsity: float = 0.3) -> Problem:
    start = dynamic_programming(UNITS, CURVES, sparsity, BOUNDS, 1)
    return Problem(UNITS, sparsity, BOUNDS, "water_fill", 1, bandit, {"dynamic programming": start})


def run(
    bandit: Bandit, trials: int = 24, store: Memory | None = None, sparsity: float = 0.3, **more: object
) -> GuidedResult:
    log: list[Episode] = []
    found = guided(
        problem(bandit, sparsity),
        CURVES,
        GUIDANCE,
        SMALL,
        FLAT,
        trials,
        2,
        0,
        store or Memory(),
        log.append,
        **more,  # type: ignore[arg-type]
    )
    assert [e.number for e in log] == list(range(len(found.episodes)))
    return found


def best(sparsity: float) -> Allocation:
    true = [weight * curve for weight, curve in zip(WEIGHTS, CURVES, strict=True)]
    return dynamic_programming(UNITS, true, sparsity, BOUNDS, 1)


@pytest.fixture(scope="module")
def found() -> GuidedResult:
    return run(Bandit(WEIGHTS))


def test_it_comes_near_the_optimum_in_two_dozen_trials(found: GuidedResult) -> None:
    bandit = Bandit(WEIGHTS)
    start = bandit.loss(problem(bandit).starts["dynamic programming"])
    optimum = bandit.loss(best(0.3))
    assert bandit.loss(found.best.allocation) < optimum + 0.3 * (start - optimum)
    assert len(found.episodes) == 24
    assert found.imagined == 8 * (1 + found.episodes[-1].draw)
    for episode in found.episodes:
        assert_exact(episode.allocation, 0.3)


def test_the_front_covers_the_range_and_each_policy_is_exact(found: GuidedResult) -> None:
    bandit = Bandit(WEIGHTS)
    assert min(found.front) == 0.2
    assert max(found.front) == 0.4
    for sparsity, allocation in found.front.items():
        assert_exact(allocation, sparsity)
        assert bandit.loss(allocation) < 1.2 * bandit.loss(best(sparsity)) + 0.01


def test_trials_of_a_round_read_the_same_text_and_the_best_known_is_among_them(found: GuidedResult) -> None:
    rounds = [[e for e in found.episodes if e.draw == draw] for draw in range(1 + found.episodes[-1].draw)]
    # In so small a world proposals coincide; they are not tried twice.
    assert len(rounds[0]) == 6
    assert all(1 <= len(trials) <= 6 for trials in rounds)
    tried: set[tuple[int, ...]] = set()
    for trials in rounds:
        kept = [e.allocation.kept for e in trials]
        assert len(set(kept)) == len(kept)
        assert len(tried & set(kept)) == (1 if tried else 0)
        tried |= set(kept)


@pytest.mark.parametrize("saves", [1, 2])
def test_killed_after_a_round_it_ends_as_if_never_killed(saves: int) -> None:
    whole = run(Bandit(WEIGHTS, noise=0.3), trials=12)
    store = Memory(die_after=saves)
    with pytest.raises(KeyboardInterrupt):
        run(Bandit(WEIGHTS, noise=0.3), trials=12, store=store)
    torch.manual_seed(99)
    store.die_after = None
    again = run(Bandit(WEIGHTS, noise=0.3), trials=12, store=store)
    assert [e.allocation.kept for e in again.episodes] == [e.allocation.kept for e in whole.episodes]
    assert again.best.allocation == whole.best.allocation
    assert again.agent.keys() == whole.agent.keys()
    for name, tensor in whole.agent.items():
        assert torch.equal(tensor, again.agent[name]), name


def test_another_sparsity_begins_with_what_was_learnt(found: GuidedResult) -> None:
    bandit = Bandit(WEIGHTS)
    second = run(bandit, trials=12, sparsity=0.35, trained=found.agent)
    alone = run(Bandit(WEIGHTS), trials=12, sparsity=0.35)
    optimum = bandit.loss(best(0.35))
    assert bandit.loss(second.best.allocation) < optimum * 1.1
    assert bandit.loss(second.best.allocation) <= bandit.loss(alone.best.allocation) + 1e-9
    assert len(second.agent["trials.loss"]) == len(found.episodes) + len(second.episodes)


def test_a_transfer_without_trials_compares_two_policies_that_its_model_likes_best(found: GuidedResult) -> None:
    bandit = Bandit(WEIGHTS)
    known = problem(bandit, 0.35)
    # The model has learnt which units matter; a policy that spares the others is no match.
    inverse = [curve / weight for weight, curve in zip(WEIGHTS, CURVES, strict=True)]
    bad = dynamic_programming(UNITS, inverse, 0.35, BOUNDS, 1)
    world = replace(known, starts={"bad": bad, **known.starts})
    second = guided(world, CURVES, GUIDANCE, SMALL, FLAT, 0, 2, 0, Memory(), lambda episode: None, found.agent)
    assert second.episodes == []
    assert second.start is None
    names = [candidate.name for candidate in second.candidates]
    assert "bad" not in names
    assert len(names) == 2
    assert bandit.loss(second.best.allocation) < bandit.loss(known.starts["dynamic programming"])
    assert torch.equal(second.agent["trials.loss"], found.agent["trials.loss"])
    alone = guided(world, CURVES, GUIDANCE, SMALL, FLAT, 0, 2, 0, Memory(), lambda episode: None)
    assert {"bad", "dynamic programming"} <= {candidate.name for candidate in alone.candidates}


def test_bounds_narrow_the_range() -> None:
    tight = Problem(UNITS, 0.3, Bounds(0.65, 1.0), "water_fill", 1, Bandit(WEIGHTS), {})
    found = guided(tight, CURVES, GUIDANCE, SMALL, FLAT, 6, 1, 0, Memory(), lambda episode: None)
    assert min(found.front) == 0.2
    assert 0.3 <= max(found.front) < 0.36
    with pytest.raises(UnreachableSparsity):
        out = Problem(UNITS, 0.5, Bounds(0.65, 1.0), "water_fill", 1, Bandit(WEIGHTS), {})
        guided(out, CURVES, GUIDANCE, SMALL, FLAT, 6, 1, 0, Memory(), lambda episode: None)


def test_without_trials_it_compares_what_the_curves_give() -> None:
    found = run(Bandit(WEIGHTS), trials=0)
    assert found.episodes == []
    assert found.best.name in ("dynamic programming", "agent")


def test_broken_trials_are_survived_and_a_broken_world_is_told() -> None:
    found = run(Bandit(WEIGHTS, broken=(3, 4, 9)), trials=12)
    assert found.best.outcome.finite
    with pytest.raises(NonFiniteLoss):
        run(Bandit(WEIGHTS, broken=range(200)), trials=6)


class Fragile(Bandit):
    """Has no finite loss with the policy that the curves like best."""

    def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
        found = super().__call__(allocation, samples)
        if allocation != dynamic_programming(UNITS, CURVES, 0.3, BOUNDS, 1):
            return found
        return replace(found, reward=0.0, loss=math.inf, perplexity=math.inf, finite=False)


def test_a_trial_without_a_finite_loss_is_not_taken_for_the_best_known() -> None:
    found = {}
    for fidelity in (Bandit, Fragile):
        world = replace(problem(fidelity([1.0] * 6)), starts={"other": best(0.3)})
        log: list[Episode] = []
        found[fidelity] = guided(world, CURVES, GUIDANCE, SMALL, FLAT, 12, 1, 0, Memory(), log.append)
    favourite, broken = (result.episodes for result in found.values())
    # Round by round the best known is the first.
    assert favourite[6].allocation == favourite[1].allocation == broken[1].allocation
    assert [e.number for e in broken if not e.outcome.finite] == [1]
    assert found[Fragile].best.outcome.finite


def test_a_transfer_whose_favourites_have_no_finite_loss_compares_the_others(found: GuidedResult) -> None:
    liked = run(Bandit(WEIGHTS), 0, trained=found.agent)
    names = {candidate.name for candidate in liked.candidates}
    favourites = {candidate.allocation for candidate in liked.candidates}

    class Fussy(Bandit):
        def __call__(self, allocation: Allocation, samples: Samples) -> Outcome:
            answer = super().__call__(allocation, samples)
            broken = replace(answer, reward=0.0, loss=math.inf, perplexity=math.inf, finite=False)
            return broken if allocation in favourites else answer

    world = problem(Fussy(WEIGHTS))
    world = replace(world, starts=world.starts | {"other": best(0.3)})
    again = guided(world, CURVES, GUIDANCE, SMALL, FLAT, 0, 2, 0, Memory(), lambda episode: None, found.agent)
    assert again.best.outcome.finite
    assert again.best.name not in names


def test_what_a_search_left_tells_the_loss_that_it_told(found: GuidedResult) -> None:
    surrogate = taught(UNITS, CURVES, found.agent)
    for sparsity, policy in found.front.items():
        mean, deviation = surrogate.predict([policy.kept])
        assert (float(mean[0]), float(deviation[0])) == pytest.approx(found.predicted[sparsity])


def test_a_round_of_one_trial_tries_something_new() -> None:
    bandit = Bandit(WEIGHTS)
    found = run(bandit, GUIDANCE.batch + 1)
    kept = [episode.allocation.kept for episode in found.episodes]
    assert len(kept) == GUIDANCE.batch + 1
    assert kept[-1] not in kept[:-1]


@pytest.mark.parametrize("change", [{"low": 0.5}, {"proposals": 6}, {"high": 1.0}])
def test_guidance_that_cannot_be_followed_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match=r"search\.guide"):
        Guidance(**{"low": 0.2, "high": 0.4, "batch": 6, "proposals": 2, **change})  # type: ignore[arg-type]
