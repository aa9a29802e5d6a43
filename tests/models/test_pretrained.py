"""Pruned folders by transformers' own ``from_pretrained``: held against the dense model with its granules masked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.layer_config import DENSE_KEY
from ffprune.models.pretrained import CODE_FILE
from ffprune.models.surgery import copy_model, mask_unit, slice_model
from ffprune.models.view import ModelView
from tests.models.conftest import CONFIGS, build

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@dataclass(frozen=True)
class Pair:
    """A folder with a pruned model, and the dense model with the same granules masked."""

    folder: Path
    masked: PreTrainedModel

    @property
    def loaded(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder)


@pytest.fixture(params=list(CONFIGS))
def pair(request, uneven, tmp_path) -> Pair:
    model = build(request.param)
    view, masked = ModelView(model), ModelView(copy_model(model))
    kept = uneven(view.units)
    for index, granules in enumerate(kept):
        mask_unit(masked, index, granules)
    slice_model(view, kept)
    save_model(model, None, tmp_path / "pruned")
    return Pair(tmp_path / "pruned", masked.model)


SIDES = {"left": slice(0, 4), "right": slice(-4, None)}


def pad(tokens: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """A batch whose second row is padded on one side, and its mask."""
    rows, mask = tokens[:2].clone(), torch.ones_like(tokens[:2])
    rows[1, SIDES[side]], mask[1, SIDES[side]] = 0, 0
    return rows, mask


def same(mine: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=tolerance)


def test_logits_and_shapes(pair, tokens) -> None:
    loaded = pair.loaded
    same(loaded(tokens).logits, pair.masked(tokens).logits)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in pair.masked.parameters())
    assert type(loaded).__name__ == type(pair.masked).__name__
    assert json.loads((pair.folder / "config.json").read_text())["architectures"] == [type(pair.masked).__name__]


def test_a_folder_holds_nothing_but_the_model(make_model, uneven, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.py").write_text("print('of the folder where somebody works')")
    view = ModelView(make_model("opt"))
    slice_model(view, uneven(view.units))
    save_model(view.model, None, tmp_path / "m")
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", CODE_FILE}


@pytest.mark.parametrize("side", SIDES)
def test_padded_batches_generate_as_the_masked_model_does(pair, tokens, side) -> None:
    rows, mask = pad(tokens, side)
    loaded = pair.loaded
    read = mask.bool()  # what stands at padding is nobody's
    same(loaded(rows, attention_mask=mask).logits[read], pair.masked(rows, attention_mask=mask).logits[read])
    ways: list[dict[str, object]] = [{}, {"use_cache": False}, {"num_beams": 3}]
    if loaded.config.model_type != "opt":  # whose positions transformers cannot take from a static cache
        ways.append({"cache_implementation": "static"})
    for way in ways:
        options = {**GREEDY, **way, "attention_mask": mask}
        mine, other = loaded.generate(rows, **options), pair.masked.generate(rows, **options)
        assert torch.equal(mine, other), way


def test_the_cache_is_as_small_as_the_layers(pair, tokens) -> None:
    loaded = pair.loaded
    cache = loaded(tokens, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [block.groups for block in ModelView(loaded).blocks]


def test_half_precision_and_device_map(pair, tokens) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    mine, other = loaded(tokens).logits.float(), pair.masked.to(torch.bfloat16)(tokens).logits.float()
    assert (mine - other).norm() < 0.05 * other.norm()


def test_saved_again_it_is_the_same_folder(pair, tokens, tmp_path) -> None:
    pair.loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, pair.loaded(tokens).logits)
    # ffprune runs experts one after another, transformers by a grouped product.
    same(load_model(tmp_path / "again")(tokens).logits, pair.loaded(tokens).logits)
    files = [load_file(folder / "model.safetensors") for folder in (pair.folder, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert (tmp_path / "again" / CODE_FILE).read_text() == (pair.folder / CODE_FILE).read_text()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (pair.folder, tmp_path / "again")]
    assert configs[0]["per_layer_config"] == configs[1]["per_layer_config"]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft
def test_adapters_are_trained_on_top(pair, tokens, tmp_path) -> None:
    torch.manual_seed(0)
    names = {path.rpartition(".")[2] for path in ModelView(pair.masked).family.layout["linears"]}
    # Widths differ from layer to layer, and LoRA takes each as it is.
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": pair.masked.config.model_type == "gpt2"}
    adapted = get_peft_model(pair.loaded, LoraConfig(r=2, target_modules=sorted(names), **settings))
    same(adapted(input_ids=tokens).logits, pair.masked(tokens).logits)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert gradients
    assert all(grad is not None for grad in gradients.values())
    assert all(float(grad.abs().sum()) > 0 for name, grad in gradients.items() if "lora_B" in name)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(pair.loaded, tmp_path / "adapter")
    same(again(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
    same(again.merge_and_unload()(tokens).logits, adapted(input_ids=tokens).logits, 1e-4)


def test_a_model_made_from_a_config_is_as_narrow(pair) -> None:
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pair.folder))
    shapes = [(block.groups, block.channels) for block in ModelView(made).blocks]
    assert shapes == [(block.groups, block.channels) for block in ModelView(pair.loaded).blocks]
    assert all(p.requires_grad for p in made.parameters())


_ORDERS = (
    "import ffprune; from transformers import LlamaConfig, AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel; import ffprune",
    "import ffprune.models.pretrained; from transformers import AutoModelForCausalLM",
    "from transformers.models.auto.modeling_auto import AutoModelForCausalLM; import ffprune",
)


@pytest.mark.slow
@pytest.mark.parametrize("imports", _ORDERS)
def test_in_whatever_order_things_are_imported(imports, model, folder) -> None:
    code = f"import sys; {imports}; print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout) == model.num_parameters()


def test_trusted_code_of_others_still_wins(pair) -> None:
    base = type(pair.masked).__name__
    code = f"from transformers import {base}\n\n\nclass Own({base}):\n    pass\n"
    (pair.folder / "modeling_own.py").write_text(code)
    file = pair.folder / "config.json"
    config = {**json.loads(file.read_text()), "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "per_layer_config"}))
    config = AutoConfig.from_pretrained(pair.folder)
    assert type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__ == "Own"


@pytest.mark.parametrize("case", list(CONFIGS))
def test_layers_alike_make_a_stock_model(case, tokens, tmp_path) -> None:
    """Where the family writes the width of a head down; OPT derives it, and its heads must stay as many."""
    model = build(case)
    view = ModelView(model)
    told = {"heads": 6, "groups": view.blocks[0].groups, "channels": 20}
    # 2 of 3 groups leave 4 of 6 heads, and the hidden width 24 is a multiple of 4.
    heads = 2 if case in ("llama_gqa", "mistral", "qwen2") else None
    explicit = getattr(model.config, "head_dim", None) is not None
    kept = [
        torch.arange(
            heads if u.kind == "attention" and heads and explicit else (u.granules if u.kind == "attention" else 8)
        )
        for u in view.units
    ]
    slice_model(view, kept)
    save_model(model, None, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert not (tmp_path / "m" / CODE_FILE).exists()
    assert config[view.family.ffn_width] == 8
    # transformers keeps what it does not read, when it saves the model again too.
    assert config[DENSE_KEY] == told
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    same(again(tokens).logits, model(tokens).logits)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())[DENSE_KEY] == told
    # A stock module may multiply in one product what the view has in several: the last bit may differ.
    torch.testing.assert_close(load_model(tmp_path / "m")(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


_ALONE = """
import json, sys
sys.modules["ffprune"] = None  # an import would fail
import torch
from transformers import AutoModelForCausalLM, AutoConfig
out = {}
for name, folder in json.loads(sys.argv[1]).items():
    wanted = torch.load(folder + ".wanted")
    tokens, expected, rows, mask = (wanted[name] for name in ("tokens", "logits", "rows", "mask"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=name != "stock")
    found = {"difference": float((model(tokens).logits - expected).abs().max()), "class": type(model).__module__}
    padded = model(rows, attention_mask=mask).logits[mask.bool()]
    found["padded"] = float((padded - wanted["padded"]).abs().max())
    for way, (options, answer) in wanted["generated"].items():
        found[way] = bool(torch.equal(model.generate(rows, attention_mask=mask, **options), answer))
    if name != "stock":
        model.save_pretrained(folder + "-again")
        again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
        found["again"] = float((again(tokens).logits - expected).abs().max())
        try:
            AutoModelForCausalLM.from_pretrained(folder)
            found["untrusted"] = "loaded"
        except Exception as error:
            found["untrusted"] = type(error).__name__
    out[name] = found
print(json.dumps(out))
"""


WAYS = {"greedy": GREEDY, "beams": {**GREEDY, "num_beams": 3}}


def answers(masked: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """What a process without ffprune must get, of the dense model whose granules are masked."""
    rows, mask = pad(tokens, "left")
    return {
        "tokens": tokens,
        "logits": masked(tokens).logits,
        "rows": rows,
        "mask": mask,
        "padded": masked(rows, attention_mask=mask).logits[mask.bool()],
        "generated": {
            way: (options, masked.generate(rows, attention_mask=mask, **options)) for way, options in WAYS.items()
        },
    }


@pytest.mark.slow
def test_without_ffprune_by_the_code_in_the_folder(uneven, tokens, tmp_path) -> None:
    folders = {}
    for case in [*CONFIGS, "stock"]:
        model = build("llama_gqa" if case == "stock" else case)
        view, masked = ModelView(model), ModelView(copy_model(model))
        kept = uneven(view.units) if case != "stock" else [torch.arange(u.granules)[:8] for u in view.units]
        for index, granules in enumerate(kept):
            mask_unit(masked, index, granules)
        slice_model(view, kept)
        save_model(model, None, tmp_path / case)
        torch.save(answers(masked.model, tokens), tmp_path / f"{case}.wanted")
        folders[case] = str(tmp_path / case)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, json.dumps(folders)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(folders)
    for case, facts in found.items():
        assert max(facts["difference"], facts["padded"]) < 1e-5, case
        assert all(facts[way] for way in WAYS), case
        if case != "stock":
            assert facts["class"].startswith("transformers_modules."), case
            assert facts["again"] < 1e-5, case
            assert facts["untrusted"] != "loaded", case
