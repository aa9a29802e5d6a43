from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ffprune.core.errors import MissingInput
from ffprune.export.inspection import cut, inspect
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.layer_config import DENSE_KEY
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from tests.models.conftest import CONFIGS, build, edit_config


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
    assert found.dense_told
    assert found.zeros == 0
    assert found.needs_code
    assert found.bytes == (tmp_path / "m/model.safetensors").stat().st_size


def alike(view: ModelView, groups: int = 2, channels: int = 8) -> None:
    slice_model(view, [torch.arange(groups if unit.kind == "attention" else channels) for unit in view.units])


def left(view: ModelView) -> int:
    return sum(linear.weight.numel() for linear in view.prunable.values())


@pytest.mark.parametrize("case", list(CONFIGS))
def test_layers_that_lost_alike_are_counted_from_the_dense_model(case, tmp_path) -> None:
    view = ModelView(build(case))
    dense, shape = view.prunable_params, (view.blocks[0].heads, view.blocks[0].groups, view.blocks[0].channels)
    alike(view)
    save_model(view.model, None, tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert [(row.heads[1], row.groups[1], row.channels[1]) for row in found.layers] == [shape] * len(view.blocks)
    assert found.removed == pytest.approx(1 - left(view) / dense)
    picture = cut(ModelView(load_model(tmp_path / "m")))
    assert picture.sparsity == pytest.approx(found.removed)
    assert picture.kept == (2, 8) * len(view.blocks)


def test_a_model_pruned_again_is_counted_from_the_first(tmp_path) -> None:
    view = ModelView(build("llama_gqa"))
    dense = view.prunable_params
    alike(view)
    save_model(view.model, None, tmp_path / "once")
    again = ModelView(load_model(tmp_path / "once"))
    slice_model(again, [torch.arange(1 + unit.layer % 2) for unit in again.units])
    save_model(again.model, None, tmp_path / "twice")
    found = inspect(tmp_path / "twice")
    assert found.needs_code
    assert found.removed == pytest.approx(1 - left(again) / dense)
    assert [row.channels for row in found.layers] == [(1, 20), (2, 20), (1, 20)]


QUERY = {"query heads alone": (1, 20), "query heads and channels": (1, 9), "channels alone": (2, 9)}


@pytest.mark.parametrize("case", ["llama_gqa", "qwen2", "mixtral", "phi3"])
@pytest.mark.parametrize("kept", list(QUERY))
def test_query_heads_that_are_gone_are_counted(case, kept, tmp_path) -> None:
    view = ModelView(build(case), "query")
    dense, (heads, channels) = view.prunable_params, QUERY[kept]
    alike(view, heads, channels)
    save_model(view.model, None, tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert found.removed == pytest.approx(1 - left(view) / dense)
    assert [row.heads for row in found.layers] == [(3 * heads, 6)] * 3
    assert [row.groups for row in found.layers] == [(3, 3)] * 3
    picture = cut(ModelView(load_model(tmp_path / "m")))
    assert picture.retention == (heads / 2, channels / 20) * 3
    assert picture.sparsity == pytest.approx(found.removed)
    assert picture.prunable == dense


def test_groups_and_then_query_heads_are_counted_together(tmp_path) -> None:
    view = ModelView(build("llama_gqa"))
    dense = view.prunable_params
    alike(view, 2, 20)
    save_model(view.model, None, tmp_path / "m")
    again = ModelView(load_model(tmp_path / "m"), "query")
    alike(again, 1, 20)
    save_model(again.model, None, tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert found.removed == pytest.approx(1 - left(again) / dense)
    assert (found.layers[0].heads, found.layers[0].groups) == ((2, 6), (2, 3))
    assert cut(ModelView(load_model(tmp_path / "m"))).retention[0] == 2 / 6


def test_a_folder_that_does_not_tell_is_counted_by_its_own_widths(tmp_path) -> None:
    for name, slicing, removed in (("alike", alike, False), ("uneven", _uneven, True)):
        view = ModelView(build("llama_gqa"))
        slicing(view)
        save_model(view.model, None, tmp_path / name)
        file = tmp_path / name / "config.json"
        told = json.loads(file.read_text())
        del told[DENSE_KEY]
        file.write_text(json.dumps(told))
        found = inspect(tmp_path / name)
        assert (found.removed > 0) == removed
        # Widths that differ say themselves what the whole is.
        assert found.dense_told == removed


@pytest.mark.parametrize(
    "told",
    [[6, 3, 20], {"heads": 6}, {"heads": 6, "groups": 3, "channels": "20"}, {"heads": 6, "groups": 3, "channels": 7}],
)
def test_dense_widths_that_cannot_be_are_refused(told, tmp_path) -> None:
    view = ModelView(build("llama_gqa"))
    alike(view)
    save_model(view.model, None, tmp_path / "m")
    edit_config(tmp_path / "m", **{DENSE_KEY: told})
    with pytest.raises(CorruptModel, match=f"{DENSE_KEY} in config.json is .*take it out"):
        inspect(tmp_path / "m")


def _uneven(view: ModelView) -> None:
    slice_model(view, [torch.arange(1 + i % unit.granules) for i, unit in enumerate(view.units)])


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
