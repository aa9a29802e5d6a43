from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from ffprune.allocate.env import Episode, PruningEnv
from ffprune.allocate.problem import Problem
from ffprune.core.budget import Bounds
from ffprune.core.policy import MAPPINGS
from ffprune.core.schedule import Schedule
from tests.allocate.worlds import Bandit, assert_exact, layers

UNITS = layers(3)
RISING = Schedule.scaled(0.5, 0.01, 500, episodes=40)
FLAT = Schedule(1.0, 1.0, 0.0)


def problem(mapping: str = "water_fill", sparsity: float = 0.3) -> Problem:
    return Problem(UNITS, sparsity, Bounds(0.2, 1.0), mapping, 4, Bandit(range(1, 7)))


def environment(schedule: Schedule, per_update: int = 8, **change: object) -> tuple[PruningEnv, list[Episode]]:
    log: list[Episode] = []
    return PruningEnv(problem(**change), schedule, per_update, log.append), log


def play(env: PruningEnv, episodes: int) -> list[float]:
    """Random scores, whole updates of 8; returns what the agent saw."""
    draw, seen = np.random.default_rng(0), []
    for _ in range(episodes):
        observation, _ = env.reset()
        seen.append(float(observation[0]))
        env.step(draw.normal(size=len(UNITS)).astype(np.float32))
        if env.episode % 8 == 0:
            env.settle()
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checker would like symmetric actions in [-1, 1]
def test_it_is_a_gymnasium_environment() -> None:
    check_env(environment(FLAT)[0], skip_render_check=True)


def test_the_state_is_the_target_sparsity_alone() -> None:
    env, _ = environment(FLAT)
    observation, info = env.reset()
    assert observation.tolist() == pytest.approx([0.3])
    assert observation.dtype == np.float32
    assert info == {}
    assert env.action_space.shape == (len(UNITS),)


def test_an_episode_is_one_step_and_its_reward_comes_with_the_updates_end() -> None:
    env, log = environment(FLAT)
    env.reset()
    scores = np.linspace(-1, 1, len(UNITS)).astype(np.float32)
    _, reward, terminated, truncated, _ = env.step(scores)
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert not log
    (reward,) = env.settle()
    (episode,) = log
    assert episode.number == 0
    assert reward == episode.outcome.reward == pytest.approx(np.exp(-env.problem.reward.loss(episode.allocation)))  # type: ignore[attr-defined]
    assert episode.allocation == env.problem.allocate(scores.astype(np.float64), 0.3)
    np.testing.assert_array_equal(episode.scores, scores)
    assert env.settle() == []


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_policy_is_on_its_budget(mapping: str) -> None:
    env, log = environment(RISING, mapping=mapping)
    play(env, 24)
    for episode in log:
        if mapping == "sequential_cap":
            assert episode.allocation.sparsity >= episode.sparsity
        else:
            assert_exact(episode.allocation, episode.sparsity)


def test_task_and_samples_stay_within_an_update_and_rise_over_updates() -> None:
    env, log = environment(RISING)
    seen = play(env, 40)
    reward = env.problem.reward
    updates = [log[i : i + 8] for i in range(0, 40, 8)]
    for number, update in enumerate(updates):
        assert {e.sparsity for e in update} == {RISING.sparsity_at(8 * number, 0.3)}
        assert {e.samples for e in update} == {RISING.samples_at(8 * number, 6)}
        assert len({e.outcome.dense_perplexity for e in update}) == 1
    for earlier, later in pairwise(updates):
        assert earlier[0].sparsity < later[0].sparsity < 0.3
        assert earlier[0].samples <= later[0].samples <= 6
    assert updates[0][0].samples < updates[-1][0].samples
    assert seen == pytest.approx([e.sparsity for e in log])
    # One draw of samples an update, another one each time.
    assert isinstance(reward, Bandit)
    assert reward.draws == [i // 8 for i in range(40)]


def test_without_a_curriculum_every_episode_is_the_final_task() -> None:
    env, log = environment(FLAT)
    play(env, 16)
    assert {(e.sparsity, e.samples) for e in log} == {(0.3, 6)}


def test_a_curriculum_starts_where_the_bounds_let_it() -> None:
    problem = Problem(layers(2), 0.4, Bounds(0.2, 0.8), "water_fill", 1, Bandit(range(1, 5)))
    env = PruningEnv(problem, Schedule(0.1, 1.0, 100.0), 4, lambda _: None)
    # a_max = 0.8 alone removes about a fifth, more than a tenth of 0.4.
    assert env.sparsity >= 0.2
    env.reset()
    env.step(np.zeros(len(problem.units), dtype=np.float32))
