"""The guided search: a model of the loss is asked first, real trials correct it and decide.

A round tries policies on common text, and the model (:mod:`ffprune.allocate.surrogate`) learns from them. Which
policies: the best one under the model as it stands, the best ones under models drawn from its posterior (Thompson
sampling: what is uncertain and might pay is tried), and what an agent proposes that PPO has trained on the model, in
imagined episodes at sparsities all over a range. One model and one agent serve the whole range: after the
search there is a policy for every sparsity in it, and a search at another sparsity begins with everything learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffprune.allocate.agent import Agent, Preset
from ffprune.allocate.dynamic import coin, dynamic_programming
from ffprune.allocate.env import Episode
from ffprune.allocate.guidance import Guidance
from ffprune.allocate.imagined import Imagined
from ffprune.allocate.problem import Problem
from ffprune.allocate.race import compare
from ffprune.allocate.search import SearchResult, Store
from ffprune.allocate.surrogate import Floats, Surrogate
from ffprune.core.errors import NonFiniteLoss
from ffprune.core.outcome import Samples
from ffprune.core.schedule import Schedule
from ffprune.core.units import Allocation, Unit

_TRIALS = "trials."
"""Prefix of the tensors that carry a search's trials to the next."""


@dataclass(frozen=True)
class GuidedResult(SearchResult):
    """What a guided search found.

    Attributes:
        imagined: episodes on the model of the loss, none of which ran the pruned model.
        front: sparsity -> policy, all over the range, best under the model.
        predicted: sparsity -> its predicted loss and standard deviation, nats a token.
    """

    imagined: int = 0
    front: dict[float, Allocation] = field(default_factory=dict)
    predicted: dict[float, tuple[float, float]] = field(default_factory=dict)


def is_guided(trained: dict[str, Tensor]) -> bool:
    """Whether these are tensors of a guided search, whose agent's scores are departures from dynamic programming."""
    return any(name.startswith(_TRIALS) for name in trained)


def guided(
    problem: Problem,
    curves: Sequence[Floats],
    guidance: Guidance,
    preset: Preset,
    schedule: Schedule,
    trials: int,
    finalists: int,
    seed: int,
    store: Store,
    on_episode: Callable[[Episode], None],
    trained: dict[str, Tensor] | None = None,
) -> GuidedResult:
    """Search the best policy at ``problem.sparsity``.

    Args:
        problem: units, target, bounds, reward and known policies.
        curves: per unit, float64 ``[m]``: the predicted loss at m equally spaced retentions from 0 to 1.
        guidance: how trials are chosen.
        preset: the agent's hyper-parameters.
        schedule: fidelity of a trial over the search (FF Eq. 5), in trials.
        trials: real evaluations; comparisons on the fixed samples are not counted.
        finalists: how many of the trials are compared at the end, besides the starts, the model's and the agent's best.
        seed: of everything random.
        store: where the state is kept between rounds; a killed search goes on from there to the same result.
        on_episode: told of every trial (after a resume, of the earlier ones as well).
        trained: tensors of an earlier search of the same model, whose trials and agent go on here.

    Raises:
        UnreachableSparsity: no allocation inside the bounds has this sparsity.
        NonFiniteLoss: no candidate has a finite loss.
    """
    surrogate = Surrogate(problem.units, curves)
    earlier = _Trials.of(trained or {})
    world = Imagined(problem, surrogate, guidance, seed, preset.episodes_per_update)
    agent = Agent(world, preset, seed)
    log: list[Episode] = []
    saved = store.load()
    if saved is not None:
        state, past, _ = saved
        agent.load_state(state)
        log.extend(past)
        for episode in past:
            on_episode(episode)
    elif trained is not None:
        agent.load_weights({k: t for k, t in trained.items() if not k.startswith(_TRIALS)})
    while True:
        earlier.teach(surrogate, log)
        world.aim()
        if len(log) >= trials:
            break
        for _ in range(-(-guidance.imagined // preset.episodes_per_update)):
            agent.update()
        number = log[-1].draw + 1 if log else 0
        samples = schedule.samples_at(len(log), problem.reward.most_samples)
        policies = _round(problem, surrogate, agent, world, guidance, log, seed * 1_000_003 + number)
        left = trials - len(log)
        # The first was tried before, and ties others to what is known: by itself it would tell nothing new.
        policies = policies[:left] if left > 1 else policies[1:2] or policies
        outcomes = problem.reward.many([allocation for _, allocation in policies], Samples(samples, number))
        for (scores, allocation), outcome in zip(policies, outcomes, strict=True):
            log.append(Episode(len(log), problem.sparsity, samples, number, scores, allocation, outcome))
            on_episode(log[-1])
        store.save(agent.state(), log, ())

    starts, own = list(problem.starts.items()), [("model of the loss", world.best)]
    if log or trained is not None:  # else the agent has learnt nothing
        own.append(("agent", world.allocate(agent.scores(problem.sparsity), problem.sparsity)))
    known = starts + own
    if len(earlier.loss):
        # The search before compared all of these; the model that it taught knows which are worth it again.
        known = _liked(surrogate, starts) + _liked(surrogate, own)
    found = known + [(f"trial {e.number}", e.allocation) for e in _ranked(surrogate, log)[:finalists]]
    try:
        candidates = compare(problem, found, (), len(log))
    except NonFiniteLoss:
        if len(known) == len(starts) + len(own):
            raise
        candidates = compare(problem, starts + own, (), len(log))
    grid = {round(float(s), 6): policy for s, policy in zip(world.grid, world.policies, strict=True)}
    means, deviations = surrogate.predict([allocation.kept for allocation in grid.values()])
    return GuidedResult(
        best=candidates[0],
        candidates=candidates,
        start=next(iter(problem.starts), None) if trained is None else None,
        episodes=log,
        agent=agent.weights() | earlier.tensors(log),
        imagined=world.episode,
        front=grid,
        predicted={s: (float(m), float(d)) for s, m, d in zip(grid, means, deviations, strict=True)},
    )


def taught(units: Sequence[Unit], curves: Sequence[Floats], trained: dict[str, Tensor]) -> Surrogate:
    """The model of the loss as a search left it.

    Args:
        units: of the search's problem.
        curves: that it began with.
        trained: :attr:`GuidedResult.agent` of that search.
    """
    surrogate = Surrogate(units, curves)
    _Trials.of(trained).teach(surrogate, [])
    return surrogate


def _ranked(surrogate: Surrogate, log: Sequence[Episode]) -> list[Episode]:
    """Trials by the loss that the model predicts; those without a finite loss, which taught it nothing, last."""
    if not log:
        return []
    means, _ = surrogate.predict([episode.allocation.kept for episode in log])
    broken = np.array([not episode.outcome.finite for episode in log])
    return [log[int(i)] for i in np.lexsort((means, broken))]


def _liked(surrogate: Surrogate, policies: list[tuple[str, Allocation]]) -> list[tuple[str, Allocation]]:
    """Of some policies the one that the model of the loss likes best; none of none."""
    if not policies:
        return []
    means, _ = surrogate.predict([allocation.kept for _, allocation in policies])
    return [policies[int(means.argmin())]]


def _round(
    problem: Problem,
    surrogate: Surrogate,
    agent: Agent,
    world: Imagined,
    guidance: Guidance,
    log: Sequence[Episode],
    seed: int,
) -> list[tuple[NDArray[np.float64], Allocation]]:
    """The policies of a round: new ones, and the best one known, which ties this round's text to the others'."""
    rng = np.random.default_rng(seed)
    chosen: dict[tuple[int, ...], tuple[NDArray[np.float64], Allocation]] = {}
    tried = {episode.allocation.kept for episode in log}

    def add(allocation: Allocation, scores: NDArray[np.float64] | None = None, known: bool = False) -> None:
        if known or allocation.kept not in tried:
            told = np.zeros(len(problem.units)) if scores is None else scores
            chosen.setdefault(allocation.kept, (told, allocation))

    if log:
        add(_ranked(surrogate, log)[0].allocation, known=True)
    elif problem.starts:
        add(next(iter(problem.starts.values())), known=True)
    add(world.best)
    for _ in range(4 * guidance.batch):
        if len(chosen) >= guidance.batch - guidance.proposals:
            break
        step = coin(problem.units, problem.step)
        add(dynamic_programming(problem.units, surrogate.draw(rng), problem.sparsity, problem.bounds, step))
    mean = agent.scores(problem.sparsity)
    for number in range(4 * guidance.batch):
        if len(chosen) >= guidance.batch:
            break
        scores = mean + (rng.normal(0, agent.preset.noise, len(mean)) if number else 0)
        add(world.allocate(scores, problem.sparsity), scores)
    return list(chosen.values())


@dataclass(frozen=True)
class _Trials:
    """Trials of searches before this one.

    Attributes:
        kept: int64 ``[n, N]``, granules kept.
        loss: float64 ``[n]``.
        text: int64 ``[n]``, which text a trial read.
    """

    kept: NDArray[np.int64]
    loss: Floats
    text: NDArray[np.int64]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> _Trials:
        if _TRIALS + "kept" not in tensors:
            return cls(np.zeros((0, 0), dtype=np.int64), np.zeros(0), np.zeros(0, dtype=np.int64))
        return cls(*(tensors[_TRIALS + name].numpy() for name in ("kept", "loss", "text")))

    def teach(self, surrogate: Surrogate, log: Sequence[Episode]) -> None:
        """Fit the model to these trials and those of this search."""
        both = self._with(log)
        if len(both.loss):
            surrogate.fit(both.kept.tolist(), both.loss.tolist(), both.text.tolist())

    def tensors(self, log: Sequence[Episode]) -> dict[str, Tensor]:
        both = self._with(log)
        named = {"kept": both.kept, "loss": both.loss, "text": both.text}
        return {_TRIALS + name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in named.items()}

    def _with(self, log: Sequence[Episode]) -> _Trials:
        if not log:
            return self
        # Trials of one update or round read the same text; of another search, another.
        first = int(self.text.max(initial=-1)) + 1
        kept = np.array([e.allocation.kept for e in log], dtype=np.int64)
        texts = np.array([first + e.draw for e in log], dtype=np.int64)
        loss = np.array([e.outcome.loss for e in log])
        if not len(self.loss):
            return _Trials(kept, loss, texts)
        return _Trials(
            np.concatenate([self.kept, kept]), np.concatenate([self.loss, loss]), np.concatenate([self.text, texts])
        )
