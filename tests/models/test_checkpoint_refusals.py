"""Every folder that load_model refuses, and what it says."""

from __future__ import annotations

import json

import pytest
import torch

from ffprune.core.errors import MissingInput, UnsafeFile, UnsupportedArchitecture
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.weights import CorruptModel
from tests.models.conftest import edit_config, edit_tensors


def test_missing_inputs_are_named(folder):
    with pytest.raises(MissingInput, match="no such folder"):
        load_model(folder / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"neither model\.safetensors"):
        load_model(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingInput, match="model-00001-of-00002"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CorruptModel, match="index"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingInput, match=r"no config\.json"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsafeFile, match=f"{name}.*safetensors only"):
        load_model(folder)


def test_code_in_the_folder_runs_only_when_trusted(folder, model, tokens, tmp_path):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    with pytest.raises(UnsafeFile, match=r"OwnForCausalLM.*trust_remote_code"):
        load_model(folder)
    trusted = load_model(folder, trust_remote_code=True)
    assert type(trusted).__name__ == "OwnForCausalLM"
    save_model(trusted, None, tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_an_unsupported_type_is_refused_before_anything_is_built(folder):
    edit_config(folder, model_type="made_up", auto_map={"AutoConfig": "x.Y"})
    with pytest.raises(UnsupportedArchitecture, match=r"'made_up'.*'llama'"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CorruptModel, match=r"config\.json cannot be used"):
        load_model(folder)


def test_a_layer_that_is_not_there_is_refused(folder):
    edit_config(folder, per_layer_config={"7": {"intermediate_size": 4}})
    with pytest.raises(CorruptModel, match="7"):
        load_model(folder)


def test_uneven_groups_are_refused(folder):
    edit_config(folder, per_layer_config={"1": {"num_attention_heads": 5, "num_key_value_heads": 2}})
    with pytest.raises(CorruptModel, match="layer 1 is to have 5 query heads for 2"):
        load_model(folder)


def test_a_shape_that_disagrees_is_named(folder):
    edit_config(folder, intermediate_size=18)
    with pytest.raises(CorruptModel, match=r"mlp\.\w+_proj\.weight' of shape \[\d+, \d+\].*says \[\d+, \d+\]"):
        edit_config(folder, per_layer_config={})
        load_model(folder)


def test_missing_and_unexpected_tensors_are_named(folder):
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CorruptModel, match=r"lack 1 tensors, the first is 'model\.norm\.weight'"):
        load_model(folder)
    edit_tensors(folder, lambda t: t.update(adapter=torch.ones(1)))
    with pytest.raises(CorruptModel, match="has a tensor 'adapter'"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_file_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match="may be truncated"):
        load_model(folder)
