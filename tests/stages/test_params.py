from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import model_validator

from ffprune.allocate.agent import PRESETS
from ffprune.core.errors import MissingInput, ParameterError
from ffprune.core.importance import CRITERIA
from ffprune.core.policy import MAPPINGS
from ffprune.evaluate.latency import PHASES
from ffprune.evaluate.reward import REWARDS
from ffprune.stages.budget import BUDGETS
from ffprune.stages.params import Scoped, UndeclaredSection, load_params, read_yaml, validate
from ffprune.stages.record import STAGES
from ffprune.stages.sections import Params, Section
from tests.stages.test_recipes import PLAIN
from tests.stages.tiny_project import merged
from tests.toy import REPO


class Ridge(Section):
    damping: float
    absolute: bool


class Toy(Section):
    seed: int
    ridge: Ridge

    @model_validator(mode="after")
    def _seed_is_even(self) -> Toy:
        if self.seed % 2:
            raise ValueError("the seed must be even")
        return self


GOOD = {"seed": 2, "ridge": {"damping": 0.01, "absolute": False}}


def refusal(values: dict[str, object]) -> str:
    with pytest.raises(ParameterError) as caught:
        validate(values, Path("params.yaml"), Toy)
    return str(caught.value)


def test_the_projects_parameters_are_valid_and_every_declared_section_exists() -> None:
    load_params(REPO / "params.yaml")
    for stage in STAGES:
        for name in stage.params:
            section, _, field = name.partition(".")
            assert section in Params.model_fields, stage.name
            assert not field or field in Params.model_fields[section].annotation.model_fields, stage.name  # type: ignore[union-attr]


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("rate: 1e-4\n")
    assert read_yaml(file) == {"rate": 1e-4}


def test_an_unknown_key_names_file_key_and_close_matches() -> None:
    message = refusal({"seed": 2, "ridge": {"dampign": 0.01, "damping": 0.01, "absolute": False}})
    assert "params.yaml" in message
    assert "'ridge.dampign' is unknown" in message
    assert "did you mean 'damping'" in message
    assert "allowed: damping, absolute" in message


def test_an_unknown_section_lists_the_sections() -> None:
    message = refusal({**GOOD, "rigde": {}})
    assert "'rigde' is unknown (did you mean 'ridge'? allowed: seed, ridge)" in message


def test_all_that_is_wrong_is_one_message() -> None:
    message = refusal({"ridge": {"damping": "much", "absolute": False}})
    assert "2 wrong parameter(s)" in message
    assert "'seed' is missing" in message
    assert "'ridge.damping'" in message
    assert "given: 'much'" in message


def test_a_contradiction_between_sections_is_refused_in_its_own_words() -> None:
    assert "the seed must be even" in refusal({**GOOD, "seed": 3})


def test_a_missing_file_and_broken_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="does not exist"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1\n")
    with pytest.raises(ParameterError, match="not valid YAML"):
        read_yaml(tmp_path / "params.yaml")


def test_a_stage_sees_only_the_sections_it_declares() -> None:
    scoped = Scoped(Toy.model_validate(GOOD), ["ridge"], "the stage 'toy'")
    assert scoped.ridge.damping == 0.01
    assert scoped.values() == {"ridge": GOOD["ridge"]}
    with pytest.raises(UndeclaredSection, match="'seed'"):
        _ = scoped.seed


def test_a_stage_that_declares_one_field_sees_that_one_alone() -> None:
    scoped = Scoped(Toy.model_validate(GOOD), ["ridge.damping"], "the stage 'toy'")
    assert scoped.ridge.damping == 0.01
    assert scoped.values() == {"ridge": {"damping": 0.01}}
    with pytest.raises(UndeclaredSection, match="'absolute'"):
        _ = scoped.ridge.absolute


def test_an_unreachable_sparsity_is_refused_before_any_stage() -> None:
    values = read_yaml(REPO / "params.yaml")
    values["transfer"]["sparsity"] = 0.95
    with pytest.raises(ParameterError, match=r"transfer\.sparsity 0\.95 is out of reach.*allows at most 0\.8"):
        validate(values, REPO / "params.yaml", Params)


def project_refusal(change: dict[str, Any]) -> str:
    """What the project's parameters are refused for, with a change."""
    with pytest.raises(ParameterError) as caught:
        validate(merged(read_yaml(REPO / "params.yaml"), change), REPO / "params.yaml", Params)
    return str(caught.value)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        ({"onload": "layer"}, ["'compute.onload'", "'model' or 'block'", "given: 'layer'"]),
        ({"device_map": "balanced"}, ["'compute.device_map'", "'auto'", "given: 'balanced'"]),
        ({"device_map": "auto", "onload": "block"}, ["'compute'", "take turns on one", "set device_map to null"]),
    ],
)
def test_a_model_larger_than_the_device_has_one_way_to_run(compute: dict[str, Any], said: list[str]) -> None:
    message = project_refusal({"compute": compute})
    for part in said:
        assert part in message


@pytest.mark.parametrize("device", ["tpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "auto", ""])
def test_a_device_that_torch_does_not_know_is_refused(device: str) -> None:
    message = project_refusal({"compute": {"device": device}})
    assert "'compute.device': a torch device is asked for: one of cpu, cuda" in message
    assert f"given: {device!r}" in message


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:12", "mps", "xpu:1"])
def test_devices_that_torch_knows_pass_wherever_they_are(device: str) -> None:
    validate(merged(read_yaml(REPO / "params.yaml"), {"compute": {"device": device}}), REPO / "params.yaml", Params)
    torch.device(device)


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        ({"low": 0.5}, ["range of sparsities from 0.5 to 0.4", "low is less than high", "search.guide.low"]),
        ({"low": 0.4}, ["from 0.4 to 0.4"]),
        ({"low": 0.0}, ["from 0 to 0.4", "above 0"]),
        ({"high": 1.0}, ["to 1 was asked", "below 1"]),
        ({"proposals": 15}, ["15 of 8 trials", "leaves the agent 0 to 6", "search.guide.batch"]),
        ({"proposals": -1}, ["-1 of 8 trials"]),
        ({"batch": 1, "proposals": 0}, ["0 of 1 trials", "2 trials or more"]),
        ({"batch": 0, "proposals": 0}, ["0 of 0 trials", "2 trials or more"]),
        ({"imagined": -1}, ["-1 imagined", "search.guide.imagined"]),
        ({"batch": 2.5}, ["'search.guide.batch'", "given: 2.5"]),
    ],
)
def test_a_guide_that_cannot_be_is_refused_before_any_stage(guide: dict[str, Any], said: list[str]) -> None:
    message = project_refusal({"search": {"guide": guide}})
    assert message.startswith(f"{REPO / 'params.yaml'} has 1 wrong parameter(s): 'search.guide")
    assert all(words in message for words in said), message


@pytest.mark.parametrize("where", [("search", "schedule"), ("transfer", "schedule"), ("study", "search", "schedule")])
@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"alpha_start": 1.5}, "schedule.alpha_start 1.5 was asked for. It is a share"),
        ({"alpha_start": -0.1}, "schedule.alpha_start -0.1"),
        ({"k": 0}, "schedule.k 0.0 was asked for. The schedule rises only"),
        ({"k": float("inf")}, "finite number"),
        ({"t0": float("nan")}, "finite number"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_any_stage(
    where: tuple[str, ...], schedule: dict[str, float], said: str
) -> None:
    change: dict[str, Any] = schedule
    for key in reversed(where):
        change = {key: change}
    message = project_refusal(change)
    assert f"'{'.'.join(where)}" in message
    assert said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"search": {"min_keep": 0.6, "max_keep": 0.5}}, "'search': min_keep 0.6 and max_keep 0.5 were asked for"),
        ({"search": {"max_keep": 1.2}}, "'search': min_keep 0.2 and max_keep 1.2"),
        ({"prune": {"min_keep": 1.0}}, "'prune': min_keep 1 and max_keep 1 were asked for"),
        ({"study": {"min_keep": -0.1}}, "'study': min_keep -0.1"),
        ({"search": {"max_keep": 0.7, "sparsity": 0.2}}, "search.sparsity 0.2 is out of reach: search.max_keep 0.7"),
    ],
)
def test_bounds_that_cannot_be_are_refused_before_any_stage(change: dict[str, Any], said: str) -> None:
    assert said in project_refusal(change)


def test_sparsities_at_the_very_end_of_the_reach_are_valid() -> None:
    # 1 - 0.9 is less than 0.1, and 1 - 0.7 more than 0.3.
    for bounds, sparsity in (({"min_keep": 0.9}, 0.1), ({"min_keep": 0.2, "max_keep": 0.7}, 0.3)):
        change = {"search": {**bounds, "sparsity": sparsity}, "transfer": {"sparsity": 0.05 if sparsity < 0.3 else 0.5}}
        validate(merged(read_yaml(REPO / "params.yaml"), change), REPO / "params.yaml", Params)


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        ("search", "agent", PRESETS),
        ("search", "mapping", MAPPINGS),
        ("search", "budget", BUDGETS),
        ("latency", "phase", PHASES),
        ("search", "reward", REWARDS),
        ("sensitivity", "criterion", CRITERIA),
        ("sensitivity", "plain_criterion", CRITERIA),
    ],
)
def test_names_are_those_of_the_tables_and_an_unknown_one_lists_them(
    section: str, key: str, known: dict[str, object]
) -> None:
    message = project_refusal({section: {key: "magic"}})
    assert f"'{section}.{key}'" in message
    assert "given: 'magic'" in message
    assert all(f"'{name}'" in message for name in known)
    for name in known:
        validate(merged(read_yaml(REPO / "params.yaml"), {section: {key: name}}), REPO / "params.yaml", Params)


def test_what_latencies_reach_is_not_known_before_they_are_measured() -> None:
    high = {"search": {"budget": "macs", "sparsity": 0.9}}
    assert "search.sparsity 0.9 is out of reach" in project_refusal(high)
    high["search"]["budget"] = "latency"
    validate(merged(read_yaml(REPO / "params.yaml"), high), REPO / "params.yaml", Params)


def test_models_to_ask_must_be_measured() -> None:
    message = project_refusal({"evaluate": {"zero_shot": {"methods": ["searched+sream"]}}})
    assert "evaluate.zero_shot.methods names ['searched+sream'], which evaluate.methods does not measure" in message


def test_more_models_have_names_that_are_folders_of_their_own() -> None:
    source = {"source": {"kind": "local", "path": "~/models/mine"}}
    message = project_refusal({"models": {"mine": source, "pruned": source}})
    assert "models has the names ['pruned']" in message
    assert "give these entries other names" in message
    assert "'models.Mine" in project_refusal({"models": {"Mine/1": source}})
    assert "'models.mine.storage_dtyp' is unknown" in project_refusal(
        {"models": {"mine": {**source, "storage_dtyp": 1}}}
    )


def test_a_method_of_a_model_that_is_not_there_lists_the_models() -> None:
    source = {"source": {"kind": "local", "path": "~/models/mine"}}
    message = project_refusal({"models": {"mine": source}, "methods": {"toy": {**PLAIN, "model": "mien"}}})
    assert "methods.toy.model 'mien' is no model; known are dense, mine" in message
    assert "add it to the section models" in message
    missing = {key: value for key, value in PLAIN.items() if key != "model"}
    assert "'methods.toy.model' is missing" in project_refusal({"methods": {"toy": missing}})
