"""The search: PPO from the best known start, checkpoints between updates, a race that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.env import Episode, PruningEnv
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import Candidate, compare, race
from ffprune.core.policy import scores_for
from ffprune.core.schedule import Schedule


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the candidate with the lowest loss.
        candidates: all that were compared, best first.
        start: name of the start the agent began from; None when it began from nothing.
        episodes: every trial.
        agent: tensors of the trained agent, optimiser included.
    """

    best: Candidate
    candidates: list[Candidate]
    start: str | None
    episodes: list[Episode]
    agent: dict[str, Tensor]


class Store(Protocol):
    """Keeps a search's state between updates, outside the outputs."""

    def load(self) -> tuple[dict[str, Tensor], list[Episode], list[Candidate]] | None:
        """The last saved state, or None."""

    def save(self, agent: dict[str, Tensor], episodes: Sequence[Episode], starts: Sequence[Candidate]) -> None:
        """Replace the saved state, atomically."""


class NoStore:
    """A :class:`Store` that keeps nothing: a search begins anew every time."""

    def load(self) -> None:
        """Nothing."""

    def save(self, agent: dict[str, Tensor], episodes: Sequence[Episode], starts: Sequence[Candidate]) -> None:
        """Forget it."""


def search(
    problem: Problem,
    preset: Preset,
    schedule: Schedule,
    episodes: int,
    finalists: int,
    seed: int,
    store: Store,
    on_episode: Callable[[Episode], None],
    trained: dict[str, Tensor] | None = None,
) -> SearchResult:
    """Search the best policy at ``problem.sparsity``.

    Args:
        problem: units, target, bounds, reward and known policies.
        preset: the agent's hyper-parameters.
        schedule: alpha(t) in episodes (FF Eq. 3).
        episodes: trials; rounded up to whole updates.
        finalists: how many of the agent's trials are compared besides the starts and its mean policy.
        seed: of the agent.
        store: where the state is kept between updates; a killed search goes on from there to the same result.
        on_episode: told of every trial (after a resume, of the earlier ones as well).
        trained: weights of an agent trained at another sparsity (policy transfer, FF 2.2).

    Raises:
        NonFiniteLoss: no candidate has a finite perplexity.
    """
    log: list[Episode] = []

    def record(episode: Episode) -> None:
        log.append(episode)
        on_episode(episode)

    env = PruningEnv(problem, schedule, preset.episodes_per_update, record)
    saved = store.load()
    if saved is not None:
        state, past, starts = saved
        agent = Agent(env, preset, seed)
        agent.load_state(state)
        for episode in past:
            record(episode)
    else:
        starts = race(problem, list(problem.starts.items()))
        warm = scores_for(np.array(starts[0].allocation.retention), problem.bounds) if starts else None
        agent = Agent(env, preset, seed, warm)
        if trained is not None:
            agent.load_weights(trained)
        store.save(agent.state(), log, starts)
    while env.episode < episodes:
        agent.update()
        store.save(agent.state(), log, starts)

    found = [("agent", problem.allocate(agent.scores(problem.sparsity), problem.sparsity))]
    for episode in most_promising(log, finalists):
        found.append((f"episode {episode.number}", problem.allocate(episode.scores, problem.sparsity)))
    candidates = compare(problem, found, starts, len(log))
    return SearchResult(
        best=candidates[0],
        candidates=candidates,
        start=starts[0].name if starts and trained is None else None,
        episodes=log,
        agent=agent.weights(),
    )


def most_promising(log: Sequence[Episode], count: int) -> list[Episode]:
    """Trials that beat their own update's mean reward most.

    Updates differ in task and text, so rewards compare within an update only; the mean of the others takes
    those differences out.
    """
    means: dict[tuple[float, int, float], list[float]] = {}
    for episode in log:
        means.setdefault(_task(episode), []).append(episode.outcome.reward)
    advantage = [e.outcome.reward / max(float(np.mean(means[_task(e)])), 1e-12) for e in log]
    order = np.argsort(-np.array(advantage), kind="stable")[:count]
    return [log[int(i)] for i in order]


def _task(episode: Episode) -> tuple[float, int, float]:
    return episode.sparsity, episode.samples, episode.outcome.dense_perplexity
