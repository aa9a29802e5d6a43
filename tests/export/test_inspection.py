from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ffprune.core.errors import MissingInput
from ffprune.export.inspection import inspect
from ffprune.models.checkpoint import save_model
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from tests.models.conftest import CONFIGS, build


@pytest.mark.parametrize("case", list(CONFIGS))
def test_widths_and_shares_are_those_of_the_cut(case, tmp_path) -> None:
    view = ModelView(build(case))
    dense = view.prunable_params
    kept = [torch.arange(1 + i % unit.granules) for i, unit in enumerate(view.units)]
    slice_model(view, kept)
    save_model(view.model, None, tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert [(row.groups[0], row.channels[0]) for row in found.layers] == [
        (len(attention), len(ffn)) for attention, ffn in zip(kept[::2], kept[1::2], strict=True)
    ]
    left = sum(linear.weight.numel() for linear in view.prunable.values())
    assert found.prunable == left
    assert found.removed == pytest.approx(1 - left / dense)
    assert found.zeros == 0
    assert found.needs_code
    assert found.bytes == (tmp_path / "m/model.safetensors").stat().st_size


def test_zeros_are_counted(tmp_path) -> None:
    view = ModelView(build("llama_gqa"))
    with torch.no_grad():
        view.prunable["layers.1.gate"].weight[:5] = 0
    save_model(view.model, None, tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert found.removed == 0
    assert not found.needs_code
    zeros = 5 * view.prunable["layers.1.gate"].in_features
    assert found.layers[1].zeros == pytest.approx(zeros / found.layers[1].weights)
    assert found.zeros == pytest.approx(zeros / found.prunable)


def test_what_does_not_load_is_refused(tmp_path) -> None:
    with pytest.raises(MissingInput, match="no such folder"):
        inspect(tmp_path / "nowhere")
    save_model(build("opt"), None, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptModel, match="truncated"):
        inspect(tmp_path / "m")


@pytest.mark.slow
def test_the_command(tmp_path) -> None:
    view = ModelView(build("llama_gqa"))
    slice_model(view, [torch.arange(1 + i % unit.granules) for i, unit in enumerate(view.units)])
    save_model(view.model, None, tmp_path / "m")
    command = [sys.executable, "-m", "ffprune", "inspect", str(tmp_path / "m")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1 of 3" in shown
    assert "loads from_pretrained after" in shown
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["layers"][0]["groups"] == [1, 3]
    refused = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "There is no config.json" in refused.stderr
