from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ffprune.core.errors import MissingInput
from ffprune.models.view import ModelView
from ffprune.stages.costs import costs
from ffprune.stages.params import load_params
from ffprune.stages.plan import SHAPES, config_of, meta_model, print_plan
from ffprune.stages.record import STAGES
from tests.tiny import llama
from tests.toy import REPO

PARAMS = load_params(REPO / "params.yaml")


@pytest.mark.parametrize("name, parameters", [("llama-7b", 6_738_415_616), ("llama-70b", 68_976_648_192)])
def test_a_shape_has_its_published_number_of_parameters_and_no_numbers(name: str, parameters: int) -> None:
    model = meta_model(config_of(name)[1])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


def test_every_stage_but_the_report_is_planned_and_larger_models_need_more() -> None:
    plans = [costs(ModelView(meta_model(config_of(name)[1])), PARAMS) for name in SHAPES]
    for plan in plans:
        assert [cost.stage for cost in plan] == [stage.name for stage in STAGES if stage.name != "report"]
    for smaller, larger in pairwise(plans):
        for less, more in zip(smaller, larger, strict=True):
            # Nothing is timed for a budget in parameters.
            assert 0 < less.memory < more.memory or less.stage == "latency"
            assert less.products <= more.products


def test_what_a_model_needs_is_known_from_its_shape_alone() -> None:
    real = llama()
    assert costs(ModelView(real), PARAMS) == costs(ModelView(meta_model(real.config)), PARAMS)


def test_the_bank_is_counted_as_it_will_be_written() -> None:
    view = ModelView(meta_model(config_of("llama-7b")[1]))
    none = PARAMS.model_copy(update={"levels": PARAMS.levels.model_copy(update={"gigabytes": 0.0})})
    much = PARAMS.model_copy(update={"levels": PARAMS.levels.model_copy(update={"gigabytes": 30.0})})
    by_name = [{cost.stage: cost for cost in costs(view, params)} for params in (none, much)]
    assert by_name[0]["levels"].disk == 0
    assert 15e9 < by_name[1]["levels"].disk <= 30e9
    difference = by_name[1]["search"].memory - by_name[0]["search"].memory
    assert difference == pytest.approx(by_name[1]["levels"].disk, rel=0.35)


def test_timing_a_model_costs_what_a_budget_of_latency_needs() -> None:
    view = ModelView(meta_model(config_of("llama-7b")[1]))
    timed = PARAMS.model_copy(update={"search": PARAMS.search.model_copy(update={"budget": "latency"})})
    nothing, much = ({cost.stage: cost for cost in costs(view, p)}["latency"] for p in (PARAMS, timed))
    assert nothing.products == nothing.disk == 0
    assert much.products > 0
    assert much.memory > 2 * 6.7e9


def test_an_unknown_model_is_refused_with_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInput, match="llama-7b, llama-13b, llama-70b"):
        config_of(str(tmp_path))


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan("llama-7b", PARAMS)
    shown = capsys.readouterr().out
    assert "6,738,415,616 parameters" in shown
    assert all(stage.name in shown for stage in STAGES if stage.name != "report")
