"""Budgets on a model: what parameters and the table of latencies make of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError, UnreachableSparsity
from ffprune.core.latency import BlockTimes
from ffprune.core.units import Allocation
from ffprune.evaluate.latency import Latencies, Probe
from ffprune.models.view import ModelView
from ffprune.stages import latency as latency_stage
from ffprune.stages.artifacts import write_json
from ffprune.stages.budget import Budget, check_budget, facts_of, warn_of_another_machine
from ffprune.stages.context import StageContext
from ffprune.stages.lineage import machine
from ffprune.stages.record import LATENCY, stage_named
from tests.stages.made_up import block_times
from tests.stages.tiny_project import params
from tests.tiny import llama, opt


def told(name: str, view: ModelView | None = None, **changes: Any) -> dict[str, Any]:
    times = block_times(view) if view else ()
    table = {"machine": machine("cpu"), "times": [asdict(t) for t in times]} if times else {}
    # As it comes out of a file.
    return dict(json.loads(json.dumps({"name": name, "context": 8, "latency": table} | changes)))


def test_every_budget_prices_the_same_units() -> None:
    view = ModelView(llama())
    budgets = {name: Budget.on(view, told(name, view)) for name in ("parameters", "macs", "latency")}
    assert all(budget.units == view.units for budget in budgets.values())
    assert {name: next(u.uneven for u in budget.units) for name, budget in budgets.items()} == {
        "parameters": False,
        "macs": False,
        "latency": True,
    }
    assert [u.dense_cost for u in budgets["parameters"].units] == [u.params for u in view.units]
    # 16 * 8 weights twice, k and v half as wide; 2 query heads of 4 with 8 keys and as many values.
    assert budgets["macs"].units[0].granule_cost == view.units[0].params_per_granule + 2 * 2 * 4 * 8
    assert budgets["macs"].units[1].granule_cost == 3 * 16
    assert budgets["latency"].units[1].dense_cost == 2_000_000


def test_a_policy_tells_what_it_removes_of_each_cost() -> None:
    view = ModelView(llama())
    policy = Allocation(view.units, (1, 24, 2, 12))
    removed = Budget.on(view, told("macs", view)).removed(policy)
    assert removed["parameters"] == policy.sparsity
    attention, channel = view.granule_macs(8)[:2]
    assert removed["macs"] == (attention + 12 * channel) / (4 * attention + 48 * channel)
    # 3 ms a dense attention, of which 2 are left with one group; 2 ms a dense FFN, 1 with half of it.
    assert removed["latency"] == pytest.approx((1 + 1) / 10, abs=1e-4)
    assert set(Budget.on(view, told("parameters")).removed(policy)) == {"parameters", "macs"}


@pytest.mark.parametrize("facts", [told("latency"), told("latency", ModelView(opt()))])
def test_a_budget_of_latency_without_the_models_table_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"no times of the units of this model.*dvc repro latency"):
        Budget.on(ModelView(llama()), facts)


def test_an_unknown_budget_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="latency, macs, parameters"):
        Budget.on(ModelView(llama()), told("watts"))


def test_a_target_out_of_reach_names_the_budget() -> None:
    view = ModelView(llama())
    with pytest.raises(
        UnreachableSparsity, match=r"0\.7 was asked for, as a share of latency. .* reach 0\.000 to 0\.5"
    ):
        Budget.on(view, told("latency", view)).check(0.7, Bounds(0.2, 1.0))
    with pytest.raises(UnreachableSparsity, match=r"sparsity 0\.95 was asked for. Bounds"):
        Budget.on(view, told("parameters")).check(0.95, Bounds(0.2, 1.0))


def test_params_are_checked_against_the_model_and_the_measured_table(tmp_path: Path) -> None:
    view, file = ModelView(llama()), tmp_path / "table.json"
    # Whole key/value groups reach less than 1 - min_keep.
    with pytest.raises(UnreachableSparsity, match=r"0\.79 was asked for. Bounds"):
        check_budget(view, params(search={"sparsity": 0.79}), file)
    with pytest.raises(UnreachableSparsity, match=r"0\.79 was asked for, as a share of macs"):
        check_budget(view, params(search={"sparsity": 0.79, "budget": "macs"}), file)
    high = params(search={"budget": "latency"}, transfer={"sparsity": 0.7})
    check_budget(view, high, file)  # nothing is known yet
    write_json(file, told("latency", view)["latency"])
    with pytest.raises(UnreachableSparsity, match=r"0\.7 was asked for, as a share of latency"):
        check_budget(view, high, file)
    check_budget(view, params(search={"budget": "latency"}), file)


def test_params_are_checked_against_what_prune_is_to_make(tmp_path: Path) -> None:
    view, file = ModelView(llama()), tmp_path / "table.json"
    high = {"search": {"sparsity": 0.62}}
    # The search reaches it; channels alone do not.
    with pytest.raises(UnreachableSparsity, match=r"0\.62 .* alone, and prune\.policies has 'handmade'\. .* to 0\.550"):
        check_budget(view, params(**high), file)
    without = {
        "prune": {"policies": ["uniform", "searched"], "min_keep": 0.05},
        "ridge": {"repairs": {"ridge": ["uniform", "searched"], "stream": ["searched"]}},
        "evaluate": {"methods": ["uniform", "searched"], "zero_shot": {"methods": []}},
    }
    check_budget(view, params(**high, **without), file)
    without["prune"]["min_keep"] = 0.6
    with pytest.raises(UnreachableSparsity, match=r"prune\.policies has 'uniform'.* Lower prune\.min_keep or"):
        check_budget(view, params(**high, **without), file)


def test_a_table_of_another_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    view = ModelView(llama())
    warn_of_another_machine(told("latency", view), "cpu")
    other = told("latency", view)
    other["latency"]["machine"]["processor"] = "an abacus"
    warn_of_another_machine({**other, "name": "macs"}, "cpu")
    assert capsys.readouterr().err == ""
    warn_of_another_machine(other, "cpu")
    assert "warning: the budget counts latencies of {'processor': 'an abacus'" in capsys.readouterr().err


# --- the stage ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**changes: Any) -> dict[str, Any]:
    latency_stage.run(StageContext(stage_named("latency"), params(**changes)))
    return dict(json.loads(Path(LATENCY).read_text()))


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_other_budgets_load_no_model(here: Path, monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    monkeypatch.setattr(latency_stage, "dense_view", lambda *_: pytest.fail("a model was loaded"))
    assert run(search={"budget": budget}) == {}
    assert facts_of(params(search={"budget": budget}).search, Path(LATENCY))["latency"] == {}


def test_the_table_tells_times_and_the_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    asked: list[Probe] = []

    def measured(view: ModelView, probe: Probe, progress: Any) -> Latencies:
        asked.append(probe)
        progress(1, 1)
        return Latencies(block_times(view), 9.0)

    monkeypatch.setattr(latency_stage, "dense_view", lambda *_: ModelView(model))
    monkeypatch.setattr(latency_stage, "block_latencies", measured)
    table = run(search={"budget": "latency"}, latency={"phase": "decode", "tokens": 7})
    assert asked == [Probe("decode", 7, 1, 12, 10)]
    assert table["machine"] == machine("cpu")
    assert table["measured_with"]["dtype"] == "float32"
    assert (table["dense_milliseconds"], table["sum_milliseconds"]) == (9.0, pytest.approx(10.0))
    facts = facts_of(params(search={"budget": "latency"}).search, Path(LATENCY))
    assert Budget.on(ModelView(model), facts).units[1].dense_cost == 2_000_000


def test_times_of_nothing_but_noise_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    units = tuple(unit.name for unit in ModelView(model).units)
    monkeypatch.setattr(latency_stage, "dense_view", lambda *_: ModelView(model))
    noise = Latencies((BlockTimes(units, 2, (1, 2), (-0.1, -0.3)),), -0.4)
    monkeypatch.setattr(latency_stage, "block_latencies", lambda *_: noise)
    with pytest.raises(ParameterError, match=r"Raise latency\.tokens"):
        run(search={"budget": "latency"})
    assert not Path(LATENCY).exists()
