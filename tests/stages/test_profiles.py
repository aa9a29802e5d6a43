from __future__ import annotations

from pathlib import Path

import pytest

from ffprune.core.errors import ParameterError
from ffprune.stages import editing, profiles
from tests.toy import REPO

PARAMS = """# The parameters.
seed: 1  # any integer

# Where the model comes from.
model:
  name: old
  more:
    - 1
data: {text: old}

# About the rest.
ridge:
  damping: 1e-2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(editing, "validate", lambda values, path, model: None)
    Path("params.yaml").write_text(PARAMS)
    Path("profiles").mkdir()
    Path("profiles/opt.yaml").write_text("# OPT-125m\nmodel:\n  name: new # of the hub\n\ndata:\n  text: new\n")
    return tmp_path


def test_only_the_two_sections_change(folder: Path) -> None:
    assert profiles.profiles() == {"opt": "OPT-125m"}
    assert profiles.current_profile() is None
    profiles.use_profile("opt")
    old_model, old_data = "model:\n  name: old\n  more:\n    - 1\n", "data: {text: old}\n"
    expected = PARAMS.replace(old_model, "model:\n  name: new # of the hub\n")
    assert Path("params.yaml").read_text() == expected.replace(old_data, "data:\n  text: new\n")
    assert profiles.current_profile() == "opt"


def test_an_unknown_profile_lists_the_known(folder: Path) -> None:
    with pytest.raises(ParameterError, match="there are opt"):
        profiles.use_profile("llama")
    assert Path("params.yaml").read_text() == PARAMS


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "profiles").glob("*.yaml")))
def test_every_shipped_profile_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPO / "params.yaml").read_text())
    Path("profiles").symlink_to(REPO / "profiles")
    profiles.use_profile(name)
    assert profiles.current_profile() == name
