"""Every folder that load_model refuses, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nan

from ffprune.core.errors import MissingInput, UnsafeFile, UnsupportedArchitecture
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model, stored_dtype
from ffprune.models.weights import CorruptModel, check_finite
from tests.models.conftest import edit_config, edit_tensors


def test_missing_inputs_are_named(folder):
    with pytest.raises(MissingInput, match="no such folder"):
        load_model(folder / "nothing")
    with pytest.raises(MissingInput, match="It is a file, and a model is a folder"):
        load_model(folder / "config.json")
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


CONFIG, INDEX, GENERATION = "config.json", "model.safetensors.index.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class Damage(NamedTuple):
    """What a file of a folder is made to say, and what the refusal says beside the file's name.

    ``text`` replaces the file, or takes the place of a setting in config.json, where one is named.
    """

    file: str
    text: str
    says: str
    setting: str = ""

    def do(self, folder: Path) -> None:
        if self.setting:
            edit_config(folder, **{self.setting: json.loads(self.text)})
            return
        (folder / self.file).write_text(self.text)
        if self.file == INDEX:
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def setting(name: str, value: str, says: str = "") -> Damage:
    return Damage(CONFIG, value, says or f"{name} is {value}", name)


def layer(name: str, value: str) -> Damage:
    own = f'{{"1": {{"{name}": {value}}}}}'
    return setting("per_layer_config", own, f"per_layer_config of layer 1: {name} is {value}")


DAMAGES = [
    Damage(CONFIG, "{", "one JSON object; it has 1 bytes"),
    Damage(CONFIG, "[]", "holds []"),
    Damage(CONFIG, "null", "holds null"),
    Damage(CONFIG, "[" * 100_000, "one JSON object"),
    Damage(CONFIG, '{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
    setting("per_layer_config", "[1, 2]"),
    setting("per_layer_config", '{"1": "x"}', 'per_layer_config of layer 1 is "x"'),
    setting("per_layer_config", '{"one": {"intermediate_size": 4}}', "'one'"),
    setting("per_layer_config", '{"1": {"hidden_size": 4}}', "of layer 1: hidden_size is set"),
    *(layer("intermediate_size", wrong) for wrong in ('"x"', "-5", "4.5", "null", "true")),
    *(layer("num_attention_heads", wrong) for wrong in ('"x"', "-3", "0")),
    *(layer("num_key_value_heads", wrong) for wrong in ("-3", "0", "1.5")),
    *(setting("auto_map", wrong) for wrong in ('["x"]', '"x"', "null")),
    *(setting("dtype", wrong) for wrong in ('"float99"', '"int8"', '"load"', "5")),
    setting("torch_dtype", '"float99"'),
    *(setting("vocab_size", wrong) for wrong in ("-1", "0", '"x"')),
    setting("vocab_size", str(10**18), "sizes=[1000000000000000000, 24]"),
    *(setting("head_dim", wrong) for wrong in ("0", "-8")),
    setting("hidden_size", "-24"),
    setting("num_attention_heads", "0"),
    setting("num_key_value_heads", "-3"),
    setting("num_hidden_layers", "-1"),
    setting("intermediate_size", "-1"),
    setting("hidden_act", '"foo"', "KeyError: 'foo'"),
    setting("pad_token_id", "1000", "Padding_idx"),
    Damage(INDEX, "[1]", "holds [1]"),
    Damage(INDEX, "{}", "weight_map is null"),
    *(Damage(INDEX, f'{{"weight_map": {wrong}}}', f"weight_map is {wrong}") for wrong in ("[1]", '{"a": 1}', "{}")),
    Damage(GENERATION, "{", "one JSON object"),
    Damage(GENERATION, "[]", "holds []"),
    Damage(GENERATION, '{"max_new_tokens": -3}', "max_new_tokens"),
    Damage(GENERATION, '{"watermarking_config": 3}', "AttributeError"),
    Damage(TOKENIZER, '{"version": "1.0", "truncation": nu', "one JSON object; it has 35 bytes"),
    Damage(TOKENIZER, "{}", "added_tokens"),
    Damage(TOKENIZER, '{"added_tokens": [], "model": {"type": "Foo"}}', "cannot be used"),
    Damage(TOKENIZER_CONFIG, "[]", "holds []"),
    Damage(TOKENIZER_CONFIG, '{"bos_token": 3}', "bos_token"),
    Damage(TOKENIZER_CONFIG, '{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}', "custom code"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: f"{damage.file}-{damage.says[:60]}")
def test_a_damaged_file_is_refused_by_its_name_and_what_is_wrong(damage, model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    save_model(model, tokenizer, folder)
    damage.do(folder)
    with pytest.raises(CorruptModel, match=re.escape(damage.file)) as caught:
        load_model(folder, stored_dtype(folder))
        load_tokenizer(folder)
    assert damage.says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unexpected_error_of_ours_is_no_refusal(folder, monkeypatch):
    def broken(*given):
        raise TypeError("a fault of the code")

    monkeypatch.setattr("ffprune.models.checkpoint.narrow", broken)
    with pytest.raises(TypeError, match="a fault of the code"):
        load_model(folder)


@pytest.mark.parametrize("wrong", [nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_weights_that_are_not_finite_are_refused(folder, model, name, dtype, wrong):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = wrong

    save_model(model, None, folder, dtype)
    edit_tensors(folder, spoil)
    with pytest.raises(CorruptModel, match=rf"model\.safetensors has a tensor '{re.escape(name)}'.* NaN or infinite"):
        load_model(folder)
    assert not load_model(folder, finite=False).get_parameter(name).isfinite().all()


def test_numbers_of_all_kinds_are_looked_at(tmp_path):
    file = tmp_path / "x.safetensors"
    for tensor in (torch.ones(0, 3), torch.ones(3, dtype=torch.int64), torch.tensor([1.0]).to(torch.float8_e4m3fn)):
        check_finite(tensor, "x", file)
    for tensor in (torch.tensor([1.0, nan]).to(torch.float8_e4m3fn), torch.tensor(nan, dtype=torch.float64)):
        with pytest.raises(CorruptModel, match="'x'"):
            check_finite(tensor, "x", file)


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
