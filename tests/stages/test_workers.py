"""The pool's logic with workers that are made up; tests/stages/test_cluster.py has real ones."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffprune.core import errors
from ffprune.core.errors import FfpruneError, ParameterError, TooLittleText, WorkersLost
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation
from ffprune.stages import cluster
from ffprune.stages.cluster import check_installed, hired
from ffprune.stages.context import Nowhere, StageContext
from ffprune.stages.record import stage_named
from ffprune.stages.sections import Workers
from ffprune.stages.workers import Lost, Pool
from tests.allocate.worlds import Bandit, layers
from tests.stages.tiny_project import params

UNITS = layers(1)
POLICIES = [Allocation(UNITS, (1 + i % 3, 1 + i)) for i in range(12)]
NONE = Workers(count=0, address=None, gpus=0)

Asked = tuple[Allocation, Samples]


@dataclass
class Made:
    """Workers that are done in a random order, and lost when they are told to be.

    Attributes:
        seed: of the order.
        lost: whether the worker is lost that is at a question (None: at getting ready), by its serial number.
        reward: what a worker says.
    """

    seed: int = 0
    lost: Callable[[int, Asked | None], bool] = lambda serial, asked: False
    reward: Bandit = field(default_factory=lambda: Bandit((1.0, 2.0)))
    asked: list[Asked] = field(default_factory=list)
    hired: list[int] = field(default_factory=list)
    at_work: dict[int, tuple[int, Asked | None]] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)

    def hire(self, worker: int) -> int:
        self.hired.append(worker)
        self.ready.discard(worker)
        return self._start(worker, None)

    def ask(self, worker: int, allocation: Allocation, samples: Samples) -> int:
        assert worker in self.ready, "asked before it had its model"
        assert worker not in {busy for busy, _ in self.at_work.values()}, "asked two things at a time"
        self.asked.append((allocation, samples))
        return self._start(worker, self.asked[-1])

    def _start(self, worker: int, asked: Asked | None) -> int:
        ticket = len(self.hired) + len(self.asked)
        self.at_work[ticket] = worker, asked
        return ticket

    def wait(self, tickets: Sequence[int]) -> int:
        assert set(tickets) == set(self.at_work)
        return random.Random(self.seed + len(self.hired) + len(self.asked)).choice(list(tickets))

    def answer(self, ticket: int) -> Outcome | None:
        worker, asked = self.at_work.pop(ticket)
        if self.lost(len(self.hired), asked):
            raise Lost("killed")
        if asked is None:
            self.ready.add(worker)
            return None
        return self.reward(*asked)


def outcomes(crew: Made, count: int, policies: Sequence[Allocation] = POLICIES) -> list[Outcome]:
    pool = Pool(crew, count, 6, 8)
    first = list(pool.many(policies, Samples(3, 0)))
    assert list(pool.many([], Samples(3, 1))) == []
    assert first + list(pool.many(policies[:2], Samples(6, None))) == [
        *(crew.reward(policy, Samples(3, 0)) for policy in policies),
        *(crew.reward(policy, Samples(6, None)) for policy in policies[:2]),
    ]
    return first


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 14), st.integers(0, 10_000))
def test_whoever_is_done_first_outcomes_keep_the_order_of_the_policies(count: int, policies: int, seed: int) -> None:
    crew = Made(seed)
    outcomes(crew, count, (POLICIES * 2)[:policies])
    assert crew.hired == list(range(count))
    assert len(crew.asked) == policies + min(policies, 2)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 10_000), st.sets(st.integers(0, 40), max_size=12))
def test_what_a_lost_worker_was_at_is_tried_again(count: int, seed: int, moments: set[int]) -> None:
    events: list[int] = []

    def lost(serial: int, asked: Asked | None) -> bool:
        events.append(1)
        # Never so often in a row that the pool gives up.
        return len(events) in moments and len(events) - 1 not in moments

    crew = Made(seed, lost)
    outcomes(crew, count)
    losses = len(crew.hired) - count
    assert len(crew.asked) <= len(POLICIES) + 2 + losses
    assert {policy for policy, *_ in crew.asked} == set(POLICIES)


def test_the_others_are_at_work_while_an_outcome_is_read() -> None:
    crew = Made()
    reading = Pool(crew, 3, 6, 8).many(POLICIES, Samples(3, 0))
    next(reading)
    assert len(crew.at_work) == 3


def test_all_workers_may_be_lost_at_once() -> None:
    crew = Made(lost=lambda serial, asked: asked is not None and serial < 8)
    outcomes(crew, 4)
    assert len(crew.hired) == 8


@pytest.mark.parametrize("ready", [False, True], ids=["at once", "when they try"])
@pytest.mark.parametrize("count", [1, 3])
def test_workers_that_are_lost_again_and_again_are_given_up(count: int, ready: bool) -> None:
    crew = Made(lost=lambda serial, asked: asked is not None or not ready)
    with pytest.raises(WorkersLost, match=rf"{count} worker\(s\); {3 * count} in a row.*killed.*workers\.count"):
        list(Pool(crew, count, 6, 8).many(POLICIES, Samples(3, 0)))


def test_a_policy_that_kills_every_worker_is_given_up() -> None:
    crew = Made(lost=lambda serial, asked: asked is not None and asked[0] == POLICIES[4])
    pool = Pool(crew, 2, 6, 8)
    with pytest.raises(WorkersLost):
        list(pool.many(POLICIES, Samples(3, 0)))
    assert len(crew.asked) <= len(POLICIES) + 3 * len(POLICIES)


def test_a_refusal_is_the_pools_own() -> None:
    class Refuses(Made):
        def answer(self, ticket: int) -> Outcome | None:
            raise TooLittleText("a", "b", "c")

    with pytest.raises(TooLittleText, match=r"a\. b\. c\."):
        list(Pool(Refuses(), 2, 6, 8).many(POLICIES, Samples(3, 0)))


def test_every_refusal_comes_back_from_another_process() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FfpruneError)]
    assert len(kinds) > 10
    for kind in kinds:
        found = pickle.loads(pickle.dumps(kind("asked 1", "possible 2.", "change 3")))
        assert type(found) is kind
        assert str(found) == "asked 1. possible 2. change 3."
        assert found.change == "change 3"


def test_a_workers_context_reads_what_the_stages_own_reads_and_writes_nowhere() -> None:
    class Open(Nowhere):
        def __reduce__(self) -> str:
            raise AssertionError("a run was sent to a worker")

    context = StageContext(stage_named("search"), params(seed=3), Open())
    copy = pickle.loads(pickle.dumps(context))
    assert (copy.stage, copy.param_values, copy.deps) == (context.stage, context.param_values, context.deps)
    assert copy.params.seed == 3
    copy.log_metrics({"reward": 1.0})


def test_without_workers_the_reward_is_made_here() -> None:
    made = Bandit((1.0, 2.0))
    with hired(lambda: made, NONE, params().search) as reward:
        assert reward is made


def test_without_ray_workers_are_refused_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    check_installed(NONE)
    with (
        pytest.raises(ParameterError, match=r"workers\.count 2.*pip install 'ffprune\[ray\]'"),
        hired(lambda: pytest.fail("work was done"), Workers(count=2, address=None, gpus=0), params().search),
    ):
        pass


@pytest.mark.parametrize(
    ("cpus", "gpus", "threads", "share", "expected"),
    [
        *[(8, 0, 1, 0, 8), (8, 0, 3, 0, 2), (2, 0, 4, 0, 0), (64, 4, 4, 1, 4), (64, 4, 32, 1, 2)],
        *[(64, 1, 1, 0.5, 2), (64, 2, 1, 0.4, 4), (64, 2, 1, 0.7, 2), (64, 5, 1, 2, 2), (64, 0, 1, 0.5, 0)],
        *[(64, 1, 1, 0.1, 10), (64, 1, 1, 1 / 3, 3)],
    ],
)
def test_room_is_whole_workers_whose_share_of_a_gpu_is_of_one(
    cpus: int, gpus: int, threads: int, share: float, expected: int
) -> None:
    node = {"Alive": True, "Resources": {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}}
    gone = {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 100.0}}
    assert cluster._room(node["Resources"], share, threads) == expected  # type: ignore[arg-type]
    cluster._check_room([node, gone, node], Workers(count=2 * expected, address=None, gpus=share), threads)
    with pytest.raises(ParameterError, match=rf"workers\.count.*{threads} processors.*room for {2 * expected} on 2"):
        cluster._check_room([node, gone, node], Workers(count=2 * expected + 1, address=None, gpus=share), threads)
