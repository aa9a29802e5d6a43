"""Baichuan-7B's files, made from a Llama's: read as that Llama, with no code of the folder run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ffprune.core.errors import UnsafeFile, UnsupportedArchitecture
from ffprune.models.checkpoint import load_model, read_view, save_model
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from ffprune.sources.base import LocalSource
from ffprune.sources.model import fetch_model
from tests.models import test_families
from tests.models.conftest import CONFIGS, LLAMA, edit_config, edit_tensors
from tests.tiny import character_tokenizer, llama, spread

BOMB = "raise RuntimeError('code of the folder ran')\n"


@pytest.fixture
def dense() -> PreTrainedModel:
    return spread(llama(tied=False, kv_heads=4))


def pack(dense: PreTrainedModel, folder: Path) -> Path:
    """A folder as Baichuan-7B's is, of the tensors of a Llama."""
    folder.mkdir()
    tensors = dense.state_dict()
    for layer in range(dense.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{role}_proj.weight") for role in "qkv"]
        tensors[f"{prefix}W_pack.weight"] = torch.cat(parts)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {name: getattr(dense.config, name) for name in (*names, "rms_norm_eps", "max_position_embeddings")}
    settings |= {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "torch_dtype": "float16"}
    settings |= {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    settings["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(BOMB)
    return folder


@pytest.fixture
def packed(dense, tmp_path) -> Path:
    return pack(dense, tmp_path / "baichuan")


class TestBaichuan(test_families.TestLlamaMha):
    """The whole suite of a family, on what is read out of such a folder."""

    params_per_granule = (4 * 4 * 24, 3 * 24)

    @pytest.fixture
    def model(self, make_model, tmp_path, monkeypatch) -> PreTrainedModel:
        plain = {**LLAMA, "num_key_value_heads": LLAMA["num_attention_heads"]}
        monkeypatch.setitem(CONFIGS, self.case, lambda: LlamaConfig(**plain, tie_word_embeddings=False))
        return load_model(pack(make_model(self.case), tmp_path / "baichuan"))


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize("onload", ["model", "block"])
def test_it_computes_what_the_llama_does(dense, packed, trust_remote_code, onload) -> None:
    tokens = torch.arange(1, 20)[None]
    loaded = load_model(packed, trust_remote_code=trust_remote_code, onload=onload)
    assert isinstance(loaded, LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)
    assert [unit.granules for unit in read_view(packed).units] == [4, 24] * 2


def test_it_is_saved_pruned_as_a_llama(packed, tmp_path) -> None:
    view = ModelView(load_model(packed))
    slice_model(view, [torch.arange(1 + i) for i in range(4)])
    save_model(view.model, None, tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"
    assert not (tmp_path / "m/code.py").exists()
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(load_model(tmp_path / "m")(tokens).logits, view.model(tokens).logits)


@pytest.mark.parametrize("change", [{"architectures": ["BaichuanForCausalLM"]}, {"architectures": None}])
def test_its_larger_and_later_relatives_are_refused(packed, change) -> None:
    edit_config(packed, **change)
    with pytest.raises(UnsupportedArchitecture, match=r"Only Baichuan-7B .*ALiBi.*normalised"):
        load_model(packed)


def test_damaged_files_are_refused(packed) -> None:
    edit_tensors(packed, lambda t: t.update({"model.layers.1.self_attn.W_pack.weight": torch.zeros(45, 16)}))
    with pytest.raises(CorruptModel, match=r"q_proj.weight' of shape \[15, 16\]"):
        load_model(packed)
    config = json.loads((packed / "config.json").read_text())
    del config["hidden_size"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptModel, match="hidden_size"):
        load_model(packed)


def test_it_is_fetched_with_a_tokenizer_that_is_data(packed, dense, tmp_path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(packed)
    settings = packed / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "BaiChuanTokenizer"}
    own["eos_token"] = {"__type": "AddedToken", "content": "<unk>"}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    source = LocalSource(path=str(packed))
    model, found, facts = fetch_model(source, tmp_path, storage_dtype="float32")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert found("A word.")["input_ids"] == tokenizer("A word.")["input_ids"]
    assert (found.eos_token, found.unk_token, found.pad_token) == ("<unk>", "<unk>", None)
    (packed / "tokenizer.json").unlink()
    with pytest.raises(UnsafeFile, match=r"Python code of its own.*put its tokenizer.json into the folder"):
        fetch_model(source, tmp_path, storage_dtype="float32")
