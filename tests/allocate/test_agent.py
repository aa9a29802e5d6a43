from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ffprune.allocate.agent import PRESETS, Agent, Preset
from ffprune.allocate.dynamic import dynamic_programming
from ffprune.allocate.env import Episode, PruningEnv
from ffprune.allocate.problem import Problem
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError
from ffprune.core.schedule import Schedule
from tests.allocate.worlds import Bandit, layers

UNITS = layers(3)
WEIGHTS = (1.0, 0.3, 4.0, 3.0, 0.2, 1.0)
BOUNDS = Bounds(0.1, 1.0)
SMALL = Preset((32,), (32,), 1e-2, 0.2, 8, 5, 0.3)


def agent_in(
    bandit: Bandit, preset: Preset = SMALL, seed: int = 0, start: Sequence[float] | None = None, sparsity: float = 0.3
) -> tuple[Agent, list[Episode]]:
    log: list[Episode] = []
    problem = Problem(UNITS, sparsity, BOUNDS, "water_fill", 1, bandit)
    env = PruningEnv(problem, Schedule(1.0, 1.0, 0.0), preset.episodes_per_update, log.append)
    return Agent(env, preset, seed, None if start is None else np.array(start)), log


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def forget() -> None:
    """The random generators of a process that did other things meanwhile."""
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002 - SB3 uses it


@pytest.mark.slow
def test_the_bandits_answer_is_found() -> None:
    bandit = Bandit(WEIGHTS)
    agent, _ = agent_in(bandit, PRESETS["warm"], start=[0.0] * 6)
    curves = [w * np.linspace(1, 0, u.granules + 1) ** 2 for w, u in zip(WEIGHTS, UNITS, strict=True)]
    best = bandit.loss(dynamic_programming(UNITS, curves, 0.3, BOUNDS, 1))
    before = bandit.loss(agent.env.problem.allocate(agent.scores(0.3), 0.3))
    for _ in range(20):  # 320 episodes
        agent.update()
    after = bandit.loss(agent.env.problem.allocate(agent.scores(0.3), 0.3))
    assert before > 1.5 * best
    assert after < best + 0.3 * (before - best)


@pytest.mark.slow
def test_rewards_rise_while_it_learns() -> None:
    agent, log = agent_in(Bandit(WEIGHTS, noise=0.0), PRESETS["warm"], start=[0.0] * 6)
    for _ in range(12):
        agent.update()
    rewards = [episode.outcome.reward for episode in log]
    assert np.mean(rewards[-32:]) > np.mean(rewards[:32]) + 0.02


def test_it_starts_from_the_given_scores() -> None:
    start = [1.0, -0.5, 0.0, 2.0, -2.0, 0.3]
    agent, log = agent_in(Bandit(WEIGHTS), start=start)
    np.testing.assert_allclose(agent.scores(0.3), start, atol=1e-5)
    agent.update()
    # Trials spread around it by the preset's noise.
    spread = np.array([episode.scores for episode in log]) - start
    assert 0.15 < spread.std() < 0.5


def test_without_a_start_scores_are_near_zero() -> None:
    agent, _ = agent_in(Bandit(WEIGHTS))
    assert np.abs(agent.scores(0.3)).max() < 0.2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_twice_to_the_same(preset: str) -> None:
    results = []
    for _ in range(2):
        agent, log = agent_in(Bandit(WEIGHTS), PRESETS[preset], seed=3)
        agent.update()
        agent.update()
        results.append((agent.weights(), [e.outcome.reward for e in log]))
        forget()
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other, _ = agent_in(Bandit(WEIGHTS), PRESETS[preset], seed=4)
    assert not same(other.weights(), results[0][0])


def test_a_state_goes_on_as_if_never_stopped() -> None:
    whole, log = agent_in(Bandit(WEIGHTS))
    for _ in range(4):
        whole.update()
    stopped, first = agent_in(Bandit(WEIGHTS))
    stopped.update()
    stopped.update()
    state = stopped.state()
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    stopped.update()  # an update that is lost
    assert same(state, frozen)
    forget()
    resumed, second = agent_in(Bandit(WEIGHTS), seed=5)
    resumed.load_state(state)
    resumed.update()
    resumed.update()
    assert [e.number for e in second] == list(range(16, 32))
    assert [e.outcome.reward for e in first[:16] + second] == [e.outcome.reward for e in log]
    assert same(resumed.state(), whole.state())


def test_a_transfer_takes_networks_and_optimiser_over() -> None:
    trained, _ = agent_in(Bandit(WEIGHTS), start=[0.5] * 6)
    trained.update()
    weights = trained.weights()
    assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in weights)
    new, log = agent_in(Bandit(WEIGHTS), seed=9, sparsity=0.5)
    new.load_weights(weights)
    assert same(new.weights(), weights)
    np.testing.assert_array_equal(new.scores(0.3), trained.scores(0.3))
    steps = new.weights()["optimizer.0.step"]
    new.update()
    assert new.weights()["optimizer.0.step"] > steps
    # What was handed over is not what is trained on.
    assert same(trained.weights(), weights)
    assert {e.sparsity for e in log} == {0.5}


def test_a_fresh_agents_weights_have_no_optimiser_state_and_load() -> None:
    fresh, _ = agent_in(Bandit(WEIGHTS))
    weights = fresh.weights()
    assert not any(name.startswith("optimizer.") for name in weights)
    other, _ = agent_in(Bandit(WEIGHTS), seed=1)
    other.load_weights(weights)
    other.update()


def test_an_agent_of_other_shapes_is_refused() -> None:
    agent, _ = agent_in(Bandit(WEIGHTS))
    wide, _ = agent_in(Bandit(WEIGHTS), Preset((16,), (32,), 1e-2, 0.2, 8, 5, 0.3))
    with pytest.raises(ParameterError, match=r"widths \(32,\) and 6 units"):
        agent.load_weights(wide.weights())
    problem = Problem(layers(2), 0.3, BOUNDS, "water_fill", 1, Bandit(WEIGHTS[:4]))
    short = Agent(PruningEnv(problem, Schedule(1.0, 1.0, 0.0), 8, lambda _: None), SMALL, 0)
    with pytest.raises(ParameterError, match=r"the same search\.agent and the same model"):
        agent.load_weights(short.weights())


@pytest.mark.parametrize("broken", [range(1000), range(0, 1000, 3)], ids=["all", "a third"])
def test_broken_trials_get_reward_zero_and_crash_nothing(broken: range) -> None:
    agent, log = agent_in(Bandit(WEIGHTS, broken=broken))
    for _ in range(3):
        agent.update()
    assert sum(not e.outcome.finite for e in log) == len([i for i in range(24) if i in broken])
    assert all(e.outcome.reward == 0 for e in log if not e.outcome.finite)
    assert all(torch.isfinite(tensor).all() for tensor in agent.weights().values())


def test_presets_are_the_papers() -> None:
    fast, sparse = PRESETS["fastforward"], PRESETS["sparsitysolver"]
    assert (fast.actor, fast.learning_rate, fast.clip) == ((256, 128), 1e-4, 0.2)
    assert (sparse.actor, sparse.critic, sparse.learning_rate) == ((256, 256), (64, 64), 5e-4)
    assert (sparse.episodes_per_update, sparse.epochs) == (15, 10)
