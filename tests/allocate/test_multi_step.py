from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.allocate.agent import PRESETS, Agent, Preset
from ffprune.allocate.env import Episode
from ffprune.allocate.multi_step import MultiStepEnv, amc
from ffprune.allocate.problem import Problem
from ffprune.allocate.search import SearchResult
from ffprune.allocate.uniform import uniform
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss, UnreachableSparsity
from ffprune.core.outcome import Samples
from ffprune.core.units import Unit
from tests.allocate.worlds import Bandit, assert_exact, between, layers, matrices, models
from tests.oracles import multi_step as oracle

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BOUNDS = Bounds(0.1, 1.0)
SMALL = Preset((32,), (32,), 1e-2, 0.2, 8, 5, 0.3)


def environment(
    units: tuple[Unit, ...] = UNITS, sparsity: float = 0.3, bounds: Bounds = BOUNDS, step: int = 1
) -> tuple[MultiStepEnv, list[Episode]]:
    log: list[Episode] = []
    problem = Problem(units, sparsity, bounds, "water_fill", step, Bandit([1.0] * len(units)))
    return MultiStepEnv(problem, 4, log.append), log


def play(env: MultiStepEnv, scores: Sequence[float]) -> tuple[list[np.ndarray], list[float]]:
    """One episode, evaluated; the states seen before each step, and the rewards of the steps."""
    state, _ = env.reset()
    states, rewards = [], []
    for i, score in enumerate(scores):
        states.append(state)
        state, reward, terminated, truncated, _ = env.step(np.array([score], dtype=np.float32))
        rewards.append(reward)
        assert terminated == (i == len(scores) - 1)
        assert not truncated
    env.settle()
    return states, rewards


def forget() -> None:
    """The random generators of another process."""
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002 - SB3 uses it


def run(bandit: Bandit | None = None, trials: int = 24, seed: int = 0, preset: Preset = SMALL) -> SearchResult:
    problem = Problem(UNITS, 0.3, BOUNDS, "water_fill", 1, bandit or Bandit(WEIGHTS))
    return amc(problem, preset, trials, 3, seed, lambda _: None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checker would like symmetric actions in [-1, 1]
def test_it_is_a_gymnasium_environment() -> None:
    check_env(environment()[0], skip_render_check=True)


def test_the_state_is_amcs() -> None:
    env, _ = environment()
    states, _ = play(env, [0.0, -10.0, 10.0, 0.0, 0.0, 0.0])
    total = sum(u.params for u in UNITS)
    # Attention: 3 granules of 40 weights; FFN: 48 of 4. At score 0 a unit wants 55%, 2 of 3 granules.
    index, kind, layer, size, gone, rest, last = np.array(states).T
    np.testing.assert_allclose(index, np.arange(6) / 5)
    np.testing.assert_array_equal(kind, [0, 1] * 3)
    np.testing.assert_array_equal(layer, [0, 0, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(size, [0, 1] * 3)
    assert gone[:2] == pytest.approx([0, 40 / total])
    assert np.all(np.diff(gone) >= 0)
    np.testing.assert_allclose(rest, np.array([816, 624, 504, 312, 192, 0]) / total)
    assert last[:4] == pytest.approx([1, 2 / 3, 5 / 48, 1])
    np.testing.assert_array_equal(env.final, states[0])
    assert states[0].dtype == np.float32


def test_matrices_of_different_roles_look_different() -> None:
    env, _ = environment(matrices(2))
    states, _ = play(env, [0.0] * 14)
    kinds = [float(state[1]) for state in states]
    assert len(set(kinds)) == 7
    assert kinds[:7] == kinds[7:]


def test_an_episode_is_evaluated_once() -> None:
    env, log = environment()
    scores = [0.5, -1.0, 2.0, 0.0, 1.0, 0.3]
    _, rewards = play(env, scores)
    (episode,) = log
    assert rewards == [0.0] * 6
    assert episode.outcome.reward > 0
    assert len(env.problem.reward.calls) == 1  # type: ignore[attr-defined]
    np.testing.assert_allclose(episode.scores, scores, rtol=1e-6)
    play(env, scores[::-1])
    assert [e.number for e in log] == [0, 1]
    assert log[0].allocation != log[1].allocation


def test_a_score_is_the_retention_of_the_single_step_where_the_budget_allows() -> None:
    env, _ = environment(matrices(3), sparsity=0.5)
    for score in (-1.0, 0.0, 0.7):
        wanted = (np.tanh(score) + 1) / 2 * 0.9 + 0.1
        assert env.bounded([], score) / env.problem.units[0].granules == pytest.approx(wanted, abs=1e-3)


@settings(deadline=None, max_examples=60)
@given(models(most_layers=4), st.floats(0, 1), st.floats(0, 0.4), st.sampled_from([1, 4, 7]), st.integers(0, 10_000))
def test_every_policy_is_on_its_budget_and_in_its_bounds(
    units: tuple[Unit, ...], share: float, low: float, step: int, seed: int
) -> None:
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    env, log = environment(units, target, bounds, step)
    states, _ = play(env, np.random.default_rng(seed).normal(scale=3, size=len(units)).tolist())
    assert_exact(log[0].allocation, target)
    for kept, retention in zip(log[0].allocation.kept, log[0].allocation.retention, strict=True):
        assert kept == 1 or retention >= low
    assert all(env.observation_space.contains(state) for state in states)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 0.5), st.data())
def test_the_wall_leaves_exactly_what_can_still_be_completed(
    granules: list[int], share: float, low: float, data: st.DataObject
) -> None:
    units = tuple(Unit(f"layers.{i}.ffn", "ffn", i, g, 3) for i, g in enumerate(granules))
    bounds = Bounds(low, 1.0)
    target = between(units, bounds, share)
    env, _ = environment(units, target, bounds)
    kept: list[int] = []
    for _ in units:
        possible = oracle.completable(units, kept, target, bounds)
        found = {env.bounded(kept, score) for score in np.linspace(-4, 4, 50)}
        assert {min(possible), max(possible)} <= found <= possible
        kept.append(data.draw(st.sampled_from(sorted(possible))))


@pytest.mark.parametrize(("score", "first", "last"), [(10.0, 1.0, 0.1), (-10.0, 0.1, 1.0)])
def test_greed_at_the_front_is_paid_for_at_the_back(score: float, first: float, last: float) -> None:
    env, log = environment(matrices(4), sparsity=0.5)
    play(env, [score] * 28)
    retention = log[0].allocation.retention
    assert (retention[0], retention[-1]) == pytest.approx((first, last), abs=1e-3)
    assert_exact(log[0].allocation, 0.5)


def test_210_matrices_of_a_million_weights() -> None:
    env, log = environment(matrices(30, 1_000_003), sparsity=0.6)
    play(env, np.random.default_rng(0).normal(size=210).tolist())
    assert_exact(log[0].allocation, 0.6)
    assert np.std(log[0].allocation.retention) > 0.1
    assert env.play(lambda _: np.zeros(1)).removed == log[0].allocation.removed


def test_an_unreachable_target_is_refused_at_once() -> None:
    with pytest.raises(UnreachableSparsity):
        environment(sparsity=0.95)


def test_the_untrained_agent_shares_evenly() -> None:
    env, _ = environment(matrices(3), sparsity=0.4)
    retention = env.play(Agent(env, SMALL, 0, np.array([np.arctanh(0.5 / 0.9 * 2 - 1)])).act).retention
    assert retention == pytest.approx([0.6] * 21, abs=0.05)


def test_trials_of_an_update_share_their_samples() -> None:
    bandit = Bandit(WEIGHTS)
    found = run(bandit, trials=17)
    assert len(found.episodes) == 24  # whole updates
    trials = [samples for _, samples in bandit.calls if samples.draw is not None]
    assert trials == [Samples(bandit.most_samples, i // 8) for i in range(24)]


def test_the_best_trials_and_the_mean_policy_are_compared() -> None:
    bandit = Bandit(WEIGHTS, noise=0.5)
    found = run(bandit)
    rewards = np.array([e.outcome.reward for e in found.episodes]).reshape(-1, SMALL.episodes_per_update)
    lead = (rewards / rewards.mean(1, keepdims=True)).flatten()
    best = {f"episode {i}" for i in np.argsort(-lead)[:3]}
    assert {c.name for c in found.candidates} == best | {"agent"}
    assert found.best == found.candidates[0]
    for candidate in found.candidates:
        assert_exact(candidate.allocation, 0.3)
        assert candidate.outcome.perplexity == pytest.approx(10 * np.exp(bandit.loss(candidate.allocation)))
    losses = [candidate.outcome.perplexity for candidate in found.candidates]
    assert losses == sorted(losses)


@pytest.mark.slow
def test_it_learns() -> None:
    bandit = Bandit(WEIGHTS, noise=0.0)
    found = run(bandit, trials=112, preset=PRESETS["warm"])
    rewards = [episode.outcome.reward for episode in found.episodes]
    assert np.mean(rewards[-32:]) > np.mean(rewards[:32]) + 0.05
    assert bandit.loss(found.best.allocation) < 0.7 * bandit.loss(uniform(UNITS, 0.3, BOUNDS))


def test_the_same_seed_gives_the_same_search() -> None:
    one = run(seed=3)
    forget()
    again, other = run(seed=3), run(seed=4)
    assert one.candidates == again.candidates
    assert [e.allocation for e in one.episodes] == [e.allocation for e in again.episodes]
    assert all(torch.equal(one.agent[name], again.agent[name]) for name in one.agent)
    assert [e.allocation for e in one.episodes] != [e.allocation for e in other.episodes]


def test_broken_trials_are_rewarded_with_nothing() -> None:
    found = run(Bandit(WEIGHTS, broken=range(0, 24, 3)))
    assert sum(e.outcome.reward == 0 for e in found.episodes) == 8
    assert found.best.outcome.finite
    with pytest.raises(NonFiniteLoss, match=r"24 trials"):
        run(Bandit(WEIGHTS, broken=range(1000)))
