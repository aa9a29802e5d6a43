"""Episodes on the model of the loss, an update's at once, against one after the other by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.imagined import Imagined
from ffprune.allocate.problem import Problem
from ffprune.allocate.surrogate import Surrogate
from ffprune.core.budget import Bounds
from ffprune.core.policy import MAPPINGS, scores_for
from tests.allocate.worlds import Bandit, layers

UNITS = layers(3)
BOUNDS = Bounds(0.1, 1.0)
CURVES = [(1 - np.linspace(0, 1, unit.granules + 1)) ** 2 for unit in UNITS]
WIDTH = 16


def world(width: int = WIDTH, seed: int = 0) -> tuple[Imagined, Surrogate]:
    problem = Problem(UNITS, 0.3, BOUNDS, "water_fill", 1, Bandit((1.0,) * len(UNITS)))
    surrogate = Surrogate(UNITS, CURVES)
    imagined = Imagined(problem, surrogate, Guidance(0.2, 0.4), seed, width)
    imagined.aim()
    return imagined, surrogate


def test_rewards_are_those_of_every_episode_by_itself() -> None:
    imagined, surrogate = world()
    sparsities = np.array(imagined.reset())[:, 0].astype(float)
    actions = np.random.default_rng(1).normal(0, 0.3, (WIDTH, len(UNITS))).astype(np.float32)
    _, rewards, ended, _ = imagined.step(actions)
    assert ended.all()
    for sparsity, action, reward in zip(sparsities, actions, rewards, strict=True):
        base = [scores_for(np.array(policy.retention), BOUNDS) for policy in imagined.policies]
        scores = [np.interp(sparsity, imagined.grid, [row[i] for row in base]) + action[i] for i in range(len(UNITS))]
        retentions = MAPPINGS["water_fill"](np.array(scores), UNITS, sparsity, BOUNDS)
        kept = [[share * unit.granules for share, unit in zip(retentions, UNITS, strict=True)]]
        dynamic = [surrogate.predict([policy.kept])[0][0] for policy in imagined.policies]
        reference = np.interp(sparsity, imagined.grid, dynamic)
        assert reward == pytest.approx(1 - surrogate.mean(kept)[0] / reference, abs=1e-4)


def test_sparsities_are_drawn_by_the_number_of_the_episode() -> None:
    imagined, _ = world()
    first = np.array(imagined.reset())
    then, *_ = imagined.step(np.zeros((WIDTH, len(UNITS)), dtype=np.float32))
    again, _ = world()
    assert (np.array(again.reset()) == first).all()
    again.episode = WIDTH
    assert (np.array(again.reset()) == np.array(then)).all()
    assert (np.array(then) != first).all()
    assert first.min() >= np.float32(0.2)
    assert first.max() <= np.float32(0.4)


def test_the_range_holds_the_target_and_its_policy_is_told() -> None:
    imagined, _ = world()
    assert 0.3 in imagined.grid
    assert imagined.best.saved == pytest.approx(0.3, abs=0.01)
    assert imagined.best in imagined.policies


def test_the_agent_learns_what_the_sum_of_curves_leaves_out() -> None:
    imagined, surrogate = world(64)
    # Neighbours in the first two layers are worse together than alone; later ones make up for each other.
    surrogate._mean[len(UNITS) :] = [0.8, 0.8, 0.0, -0.5, -0.5]
    imagined.aim()
    agent = Agent(imagined, Preset((16,), (16,), 1e-2, 0.2, 64, 10, 0.3), 0)

    def gain() -> float:
        policy = imagined.allocate(agent.scores(0.3), 0.3)
        return float(1 - surrogate.mean([policy.kept])[0] / surrogate.mean([imagined.best.kept])[0])

    before = gain()
    for _ in range(60):
        agent.update()
    assert imagined.episode == 60 * 64
    assert gain() > max(0.03, before + 0.03)
