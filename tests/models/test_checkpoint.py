"""Model folders: what they hold, and what survives a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import ffprune
from ffprune.core.errors import DiskFull, MissingInput, ParameterError
from ffprune.models import checkpoint
from ffprune.models.blocks import BlockWalk
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model, stored_dtype
from ffprune.models.surgery import mask_unit, read_unit, set_unit, slice_model
from ffprune.models.view import ModelView
from ffprune.models.weights import placement
from tests.models.conftest import CONFIGS, edit_tensors
from tests.oracles.calibration import collect

LOAD_ALL = """
import sys
import torch
from safetensors.torch import load_file, save_file
import ffprune
torch.set_num_threads(1)
folder = sys.argv[1]
tokens = load_file(f"{folder}/tokens.safetensors")["tokens"]
logits = {name: ffprune.load_model(f"{folder}/{name}")(tokens).logits for name in sys.argv[2:]}
save_file(logits, f"{folder}/logits.safetensors")
"""


@pytest.mark.slow
def test_a_new_process_computes_the_same_logits(make_model, tokens, uneven, tmp_path):
    models = {name: make_model(name) for name in CONFIGS}
    for name, model in models.items():
        view = ModelView(model)
        slice_model(view, uneven(view.units))
        save_model(model, None, tmp_path / name)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    subprocess.run([sys.executable, "-c", LOAD_ALL, str(tmp_path), *models], check=True)
    logits = load_file(tmp_path / "logits.safetensors")
    for name, model in models.items():
        torch.testing.assert_close(logits[name], model(tokens).logits, rtol=0, atol=1e-6)


def test_importing_ffprune_does_not_import_torch():
    code = "import sys, ffprune; ffprune.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ffprune.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ffprune.nothing


def test_a_dense_folder_is_an_ordinary_transformers_folder(make_model, tokens, tmp_path):
    model = make_model("llama_gqa")
    save_model(model, None, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert "per_layer_config" not in config
    assert not config.get("allow_global_per_layer_attribute_access", False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_a_pruned_folder_has_a_config_that_transformers_reads(model, folder):
    config = AutoConfig.from_pretrained(folder)
    assert [c.intermediate_size for c in config.per_layer_config] == [
        layer.mlp.down_proj.in_features for layer in model.model.layers
    ]


def test_a_folder_that_transformers_wrote_loads(make_model, tokens, tmp_path):
    for name in ("llama_mha", "opt_350m"):
        model = make_model(name)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        assert torch.equal(load_model(tmp_path / name)(tokens).logits, model(tokens).logits)


def test_old_names_and_repeated_tied_weights_are_understood(make_model, tokens, tmp_path):
    for name in ("opt", "llama_gqa"):
        model = make_model(name)
        save_model(model, None, tmp_path / name)

        def older(tensors, model=model):
            head = model.get_input_embeddings().weight
            for key in list(tensors):
                tensors[key.removeprefix("model.")] = tensors.pop(key)
            tensors["lm_head.weight"] = head.clone()
            tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

        edit_tensors(tmp_path / name, older)
        assert torch.equal(load_model(tmp_path / name)(tokens).logits, model(tokens).logits)


def test_dtype_and_device(folder):
    model = load_model(folder, dtype=torch.bfloat16, device_map="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert load_model(folder, device_map="cpu").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "2 of 2 modules, 'lm_head' the first.*compute.onload to block"),
        ({"model": "meta", "lm_head": "cpu"}, "1 of 2 modules, 'lm_head' the first.*compute.onload to block"),
        ({"model.embed_tokens": "cpu"}, "says nothing of 'model.layers.0"),
        ({"": "nowhere"}, "The device 'nowhere' was asked for.*Set compute.device"),
        ("balanced", "The device 'balanced' was asked for"),
    ],
)
def test_a_map_that_leaves_weights_without_a_device_is_refused(model, device_map, said):
    with pytest.raises(ParameterError, match=said):
        placement(model, "cpu", device_map)


def test_modules_on_devices_of_their_own_are_dispatched(make_model, tmp_path, tokens):
    save_model(make_model("llama_mha"), None, tmp_path / "m")
    model = load_model(tmp_path / "m", device_map={"model": "cpu", "lm_head": "cpu"})
    assert torch.equal(model(tokens).logits, make_model("llama_mha")(tokens).logits)
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    layer = model.model.layers[0]
    hooked = layer.forward
    walk = BlockWalk(ModelView(model), tokens, 2)
    assert layer.forward is hooked  # recording what enters the layers took nothing away
    grams = walk.observe(("down",))[0]
    assert torch.equal(grams["down"].xx, collect(ModelView(model), tokens, ["layers.0.down"], 2)["layers.0.down"].xx)


def test_large_models_are_written_in_shards_of_which_one_is_in_memory(model, tmp_path, monkeypatch):
    made = []
    compact = checkpoint._compact
    monkeypatch.setattr(checkpoint, "_compact", lambda tensor: made.append(compact(tensor)) or made[-1])
    held = []
    written = checkpoint.save_file

    def save(tensors, file, metadata):
        held.append(sum(tensor.nbytes for tensor in made))
        made.clear()
        written(tensors, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save)
    save_model(model, None, tmp_path / "m", torch.float16, max_shard_size=6000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) == len(held) > 3
    assert max(held) <= 6000
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}
    assert len({file.stat().st_mode for file in (tmp_path / "m").iterdir()}) == 1
    assert load_model(tmp_path / "m", dtype=stored_dtype(tmp_path / "m")).dtype == torch.float16
    loaded = load_model(tmp_path / "m").state_dict()
    assert all(torch.equal(loaded[name], weight.half().float()) for name, weight in model.state_dict().items())


def test_prefix_views_are_saved_without_their_hidden_rest(make_model, tokens, tmp_path):
    view = ModelView(make_model("llama_gqa"))
    for index in range(len(view.units)):
        set_unit(view, index, read_unit(view, index).prefix(1))
    save_model(view.model, None, tmp_path / "m")
    size = sum(p.nbytes for p in view.model.parameters())
    assert size < (tmp_path / "m/model.safetensors").stat().st_size < size + 5000
    assert torch.equal(load_model(tmp_path / "m")(tokens).logits, view.model(tokens).logits)


def test_surgery_on_a_loaded_model_leaves_its_file_alone(folder, tokens):
    before = (folder / "model.safetensors").read_bytes()
    loaded = load_model(folder)
    mask_unit(ModelView(loaded), 1, torch.tensor([0]))
    masked = loaded(tokens).logits
    assert (folder / "model.safetensors").read_bytes() == before
    save_model(loaded, None, folder)
    assert torch.equal(load_model(folder)(tokens).logits, masked)


def test_saving_does_not_change_the_model_and_files_are_shareable(model, folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]
    config = model.config.to_dict()
    save_model(model, None, folder)
    assert model.config.to_dict() == config


def test_tokenizer_round_trip(model, tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    save_model(model, PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "m")
    assert load_tokenizer(tmp_path / "m")("ba")["input_ids"] == [0]
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "m/tokenizer_config.json").unlink()
    with pytest.raises(MissingInput, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "m")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_earlier_output(model, folder, monkeypatch, error):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(DiskFull, match=r"MB.*MB free"):
        save_model(model, None, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_disk_too_small_is_refused_before_writing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DiskFull):
        save_model(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_any_other_failure_leaves_the_earlier_output_too(model, folder, monkeypatch):
    def fail(*_, **__):
        raise PermissionError("not allowed")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(PermissionError):
        save_model(model, None, folder)
    assert list(folder.parent.iterdir()) == [folder]
    load_model(folder)


def test_a_failed_swap_puts_the_earlier_output_back(model, folder, monkeypatch):
    replace = Path.replace

    def fail_into_place(self, target):
        if self.name.endswith(".ffprune"):
            raise OSError("cannot rename")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_into_place)
    with pytest.raises(OSError, match="cannot rename"):
        save_model(model, None, folder)
    assert list(folder.parent.iterdir()) == [folder]
    load_model(folder)
