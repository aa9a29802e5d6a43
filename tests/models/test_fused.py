"""Fused projections taken apart and put together: nothing moves, files keep the family's names and layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
from transformers.pytorch_utils import Conv1D

from ffprune.compress.cut import cut
from ffprune.compress.follow import follow
from ffprune.core.errors import UnsupportedArchitecture
from ffprune.core.units import Allocation
from ffprune.export.inspection import inspect
from ffprune.models.calibration import Calibration
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.families import FAMILIES
from ffprune.models.fused import Parts, put_together
from ffprune.models.layer_config import read_layer_config
from ffprune.models.surgery import copy_model, light_copy, slice_model
from ffprune.models.view import ModelView
from tests.models.conftest import GPT2, NEOX, build, edit_config, edit_tensors

FUSED = ["phi3", "gpt_neox", "gpt2"]


@pytest.fixture(params=FUSED)
def case(request) -> str:
    return request.param


def stored(folder) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_parts_compute_what_the_fused_linears_did(case, tokens) -> None:
    model = build(case)
    expected = model(tokens).logits
    count = model.num_parameters()
    view = ModelView(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert model.num_parameters() == count
    parts = [module for module in model.modules() if isinstance(module, Parts)]
    assert len(parts) == 3 * len(view.family.fused)
    again = ModelView(model)
    assert all(again.prunable[name] is linear for name, linear in view.prunable.items())


def test_rows_are_found_by_hand(case) -> None:
    """The second head's key, read off the stock module by the family's own rules."""
    stock, view = build(case), ModelView(build(case))
    layer = stock.get_submodule(view.family.layers)[1]
    if case == "phi3":  # 24 rows of q, then 12 of k
        rows = layer.self_attn.qkv_proj.weight[24 + 4 : 24 + 8]
    elif case == "gpt_neox":  # q, k and v of head 0, then q of head 1
        rows = layer.attention.query_key_value.weight[12 + 4 : 12 + 8]
    else:
        rows = layer.attn.c_attn.weight[:, 24 + 4 : 24 + 8].T
    assert torch.equal(view.blocks[1].linears["k"].weight[4:8], rows)


def test_weights_are_shared_where_rows_lie_together(make_model) -> None:
    model = make_model("phi3")
    fused = model.model.layers[0].mlp.gate_up_proj.weight
    view = ModelView(model)
    up = view.blocks[0].linears["up"].weight
    assert up.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_a_viewed_model_is_saved_as_it_was_published(case, tmp_path) -> None:
    model = build(case)
    published = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "stock")
    view = ModelView(model)
    model.save_pretrained(tmp_path / "viewed")
    save_model(model, None, tmp_path / "saved")
    names = set(stored(tmp_path / "stock"))
    for folder in ("viewed", "saved"):
        tensors = stored(tmp_path / folder)
        assert set(tensors) == names
        for name, tensor in tensors.items():
            own = {value: key for key, value in view.family.stored_as.items()}.get(name, name)
            assert torch.equal(tensor, published[own])
        assert not (tmp_path / folder / "modeling_pruned.py").exists()
    state = torch.get_rng_state()
    with put_together(model):
        assert set(model.state_dict()) == set(published)
        assert not any(isinstance(module, Parts) for module in model.modules())
        kinds = {type(module) for module in model.get_submodule(view.family.layers).modules()}
        assert (Conv1D in kinds) == (case == "gpt2")
    assert view.prunable["layers.0.q"] is ModelView(model).prunable["layers.0.q"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_pruned_and_viewed_model_is_saved_by_transformers(case, tokens, uneven, tmp_path) -> None:
    model = build(case)
    view = ModelView(model)
    slice_model(view, uneven(view.units))
    model.save_pretrained(tmp_path / "m")
    assert any(isinstance(module, Parts) for module in model.modules())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy_model, light_copy])
def test_copies_are_independent(case, duplicate, tokens, uneven) -> None:
    model = build(case)
    ModelView(model)
    expected = model(tokens).logits
    other = ModelView(duplicate(model))
    slice_model(other, uneven(other.units))
    other.model.set_attn_implementation("eager")
    assert torch.equal(model(tokens).logits, expected)
    assert model.config._attn_implementation != "eager"
    assert {block.attention.config._attn_implementation for block in other.blocks} == {"eager"}
    third = copy_model(other.model)
    assert torch.equal(third(tokens).logits, other.model(tokens).logits)


def test_layers_take_turns_on_the_device(case, tokens, tmp_path) -> None:
    save_model(build(case), None, tmp_path / "m", torch.float16)
    views = ModelView(load_model(tmp_path / "m")), ModelView(load_model(tmp_path / "m", onload="block"))
    for mine, other in zip(*(Calibration(tokens, 3).grams(view) for view in views), strict=True):
        assert all(torch.equal(gram.xx, other[role].xx) for role, gram in mine.items())
    for number, view in enumerate(views):
        kept = tuple(-(-unit.granules // 2) for unit in view.units)
        cut(view, Allocation(view.units, kept), tokens, 3, "wanda_column", "ridge", 0.01, dense_inputs=False)
        save_model(view.model, None, tmp_path / str(number), torch.float16)
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_the_stream_of_a_parallel_residual_is_followed(tokens) -> None:
    view = ModelView(build("gpt_neox"))
    allocation = Allocation(view.units, tuple(-(-unit.granules // 2) for unit in view.units))
    follow(view, allocation, tokens, 2, "wanda_column", 0.01)
    assert [(b.groups, b.channels) for b in view.blocks] == [(3, 10)] * 3


def test_gpt2_need_not_write_its_ffn_width_down(tokens, tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2)).eval()
    view = ModelView(model)
    assert view.blocks[0].channels == 4 * 24
    save_model(model, None, tmp_path / "dense")
    config = load_model(tmp_path / "dense").config
    assert not config.is_heterogeneous
    assert [row.channels for row in inspect(tmp_path / "dense").layers] == [(96, 96)] * 3
    assert {shape.channels for shape in read_layer_config(config, view.family)} == {96}
    slice_model(view, [torch.arange(5 if i == 1 else unit.granules) for i, unit in enumerate(view.units)])
    save_model(model, None, tmp_path / "pruned")
    for loaded in (load_model(tmp_path / "pruned"), AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")):
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
        assert [block.channels for block in ModelView(loaded).blocks] == [5, 96, 96]


def test_old_files_have_masks_and_other_names(tokens, tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**NEOX)).eval()
    save_model(model, None, tmp_path / "m")
    assert "embed_out.weight" in stored(tmp_path / "m")

    def age(tensors: dict[str, Tensor]) -> None:
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)

    edit_tensors(tmp_path / "m", age)
    assert torch.equal(load_model(tmp_path / "m")(tokens).logits, model(tokens).logits)
    tensors = stored(tmp_path / "m")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, tmp_path / "m/model.safetensors")
    assert torch.equal(load_model(tmp_path / "m")(tokens).logits, model(tokens).logits)


def test_what_is_not_the_familys_linear_is_refused(make_model) -> None:
    model = make_model("phi3")
    model.model.layers[2].mlp.gate_up_proj = nn.Sequential(model.model.layers[2].mlp.gate_up_proj)
    with pytest.raises(UnsupportedArchitecture, match=r"gate_up_proj.*is a Sequential.*quantisation or adapters"):
        ModelView(model)
    del model.model.layers[2].self_attn.qkv_proj
    with pytest.raises(UnsupportedArchitecture, match=r"has no 'self_attn.qkv_proj'"):
        ModelView(model)


def test_a_layer_wider_than_the_model_is_refused(tmp_path) -> None:
    save_model(build("phi3"), None, tmp_path / "m")
    edit_config(tmp_path / "m", per_layer_config={"1": {"intermediate_size": 21}})
    with pytest.raises(Exception, match=r"layer 1, mlp.gate_up_proj is to be \[21, 21\] wide"):
        load_model(tmp_path / "m")


def test_rows_of_the_table_agree_with_themselves() -> None:
    for family in FAMILIES.values():
        for fusion in family.fused:
            assert {family.paths[role] for role in fusion.roles} == {f"{fusion.path}.{role}" for role in fusion.roles}
        assert family.attention_output.startswith(family.attention)
