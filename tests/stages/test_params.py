from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import model_validator

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.params import Scoped, UndeclaredSection, load_params, read_yaml, validate
from ffprune.stages.record import STAGES
from ffprune.stages.sections import Params, Section
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
        assert set(stage.params) <= set(Params.model_fields), stage.name


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


def test_an_unreachable_sparsity_is_refused_before_any_stage() -> None:
    values = read_yaml(REPO / "params.yaml")
    values["transfer"]["sparsity"] = 0.95
    with pytest.raises(ParameterError, match=r"transfer\.sparsity 0\.95 is out of reach.*allows at most 0\.8"):
        validate(values, REPO / "params.yaml", Params)
