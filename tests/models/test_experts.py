"""A mixture of experts seen as one wide FFN: nothing moves, files keep their names, every expert has its order."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ffprune.compress.cut import cut, rank_unit
from ffprune.compress.levels import Levels
from ffprune.core.errors import UnsupportedArchitecture
from ffprune.core.fluctuation import wifv
from ffprune.core.importance import CRITERIA, rank
from ffprune.core.ridge import repair
from ffprune.core.units import Allocation
from ffprune.evaluate.footprint import footprint
from ffprune.models.calibration import Calibration
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.curvature import output_curvature
from ffprune.models.experts import Mixture
from ffprune.models.families import family_of
from ffprune.models.fused import put_together
from ffprune.models.surgery import copy_model, light_copy, mask_unit, param_count, slice_model, slice_unit
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from ffprune.stages.evidence import granule_scores
from tests.models.conftest import LLAMA, build, edit_tensors
from tests.oracles.calibration import collect

EXPERTS, WIDTH, FFN = 4, 20, 1


@pytest.fixture(params=["mixtral", "qwen2_moe", "qwen3_moe"])
def case(request) -> str:
    return request.param


def down_gram(view: ModelView, tokens: Tensor):
    return collect(view, tokens, {"layers.0.down"}, 4)["layers.0.down"]


def test_it_computes_what_the_stock_module_does(case, tokens) -> None:
    model = build(case)
    expected, count = model(tokens).logits, param_count(model)
    view = ModelView(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert param_count(model) == count
    assert sum(isinstance(module, Mixture) for module in model.modules()) == 3
    again = ModelView(model)
    assert all(again.prunable[name] is linear for name, linear in view.prunable.items())


def test_gradients_are_those_of_the_stock_module(case, tokens) -> None:
    stock, seen = build(case), build(case)
    stock.set_experts_implementation("eager")
    ModelView(seen)
    for model in (stock, seen):
        model.requires_grad_(True)
        model(tokens, labels=tokens).loss.backward()
    experts, mixture = (model.model.layers[1].mlp.experts for model in (stock, seen))
    down = experts.down_proj.grad.transpose(0, 1).flatten(1)
    up = experts.gate_up_proj.grad[:, WIDTH:].flatten(0, 1)
    torch.testing.assert_close(mixture.down.weight.grad, down, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixture.up.weight.grad, up, rtol=1e-4, atol=1e-6)
    routers = [model.model.layers[0].mlp.gate.weight.grad for model in (stock, seen)]
    torch.testing.assert_close(routers[0], routers[1], rtol=1e-4, atol=1e-6)


def test_a_viewed_model_is_saved_as_it_was_published(case, tmp_path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path / "stock")
    ModelView(model)
    model.save_pretrained(tmp_path / "viewed")
    save_model(model, None, tmp_path / "saved", max_shard_size=20_000)
    published = load_file(tmp_path / "stock" / "model.safetensors")
    infix = "block_sparse_moe.experts.3.w1" if case == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"model.layers.0.{infix}.weight" in published
    for folder in ("viewed", "saved"):
        tensors: dict[str, Tensor] = {}
        for file in (tmp_path / folder).glob("*.safetensors"):
            tensors |= load_file(file)
        assert tensors.keys() == published.keys()
        assert all(torch.equal(tensor, published[name]) for name, tensor in tensors.items())
    with put_together(model):
        assert not any(isinstance(module, Mixture) for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy_model, light_copy])
def test_copies_are_independent(case, duplicate, tokens, uneven) -> None:
    model = build(case)
    ModelView(model)
    expected = model(tokens).logits
    view = ModelView(duplicate(model))
    slice_model(view, uneven(view.units))
    assert torch.equal(model(tokens).logits, expected)
    assert (view.model(tokens).logits - expected).abs().max() > 1e-3


def test_every_expert_keeps_its_own_channels(case, tokens) -> None:
    model = build(case)
    generator = torch.Generator().manual_seed(4)
    kept = torch.stack([torch.randperm(WIDTH, generator=generator)[:9] for _ in range(EXPERTS)], 1)
    sliced, masked = (ModelView(copy_model(model)) for _ in range(2))
    slice_unit(sliced, FFN, kept)
    mask_unit(masked, FFN, kept)
    torch.testing.assert_close(sliced.model(tokens).logits, masked.model(tokens).logits, rtol=0, atol=1e-5)
    stock = build(case).model.layers[0].mlp.experts
    expert = sliced.blocks[0].linears["down"].parts[2]
    assert torch.equal(expert, stock.down_proj[2][:, kept[:, 2]])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_expert_is_ranked_and_repaired_by_itself(criterion, tokens) -> None:
    """Held against each expert alone, with lambda a share of the mean diagonal of all."""
    view = ModelView(build("mixtral"))
    gram, parts = down_gram(view, tokens), view.unit_linears(FFN)
    weight = parts.last.weight
    found = rank(criterion, weight, gram.xx, parts.width["down"], 0.01, parts.runs)
    assert found.order.shape == (WIDTH, EXPERTS)
    strength = 0.01 * float(gram.diag.mean())
    error = 0
    for expert, (part, block) in enumerate(zip(parts.last.parts, gram.xx, strict=True)):
        alone = rank(criterion, part, block, 1, strength / float(block.diagonal().mean()))
        assert torch.equal(found.order[:, expert], alone.order)
        error = error + alone.error
    torch.testing.assert_close(found.error, error)
    kept = found.order[:7]
    mended = repair(weight, gram.xx, parts.columns(kept), 0.01)
    whole = torch.block_diag(*gram.xx)
    torch.testing.assert_close(mended, repair(weight, whole, parts.columns(kept), 0.01), rtol=1e-4, atol=1e-5)
    banked = Levels(view, [view_order(view, i, found.order) for i in range(6)], grams(view, tokens), 0.01).make(FFN, 7)
    torch.testing.assert_close(banked, mended, rtol=1e-3, atol=1e-4)


def view_order(view: ModelView, index: int, first: Tensor) -> Tensor:
    return first if index == FFN else torch.arange(view.units[index].granules)


def grams(view: ModelView, tokens: Tensor) -> list[Tensor]:
    names = [f"layers.{u.layer}.{view.unit_linears(i).last_role}" for i, u in enumerate(view.units)]
    found = collect(view, tokens, names, 4)
    return [found[name].xx for name in names]


@pytest.fixture
def deserted() -> ModelView:
    """A model whose expert 2 of the first layer no token can go to: of two opposite logits one is above 0."""
    model = build("mixtral")
    router = model.model.layers[0].mlp.gate
    router.top_k = 1
    with torch.no_grad():
        router.weight[2] = 0
        router.weight[1] = -router.weight[0]
    return ModelView(model)


def test_the_bank_leaves_an_expert_without_tokens_as_it_is(deserted, tokens) -> None:
    orders = [torch.arange(unit.granules).flip(0) for unit in deserted.units]
    orders[FFN] = torch.stack([torch.randperm(WIDTH) for _ in range(EXPERTS)], 1)
    last = deserted.blocks[0].linears["down"]
    made = Levels(deserted, orders, grams(deserted, tokens), 0.01).make(FFN, 12)
    parts = made.unflatten(1, (EXPERTS, 12)).unbind(1)
    dense = [part[:, orders[FFN][:12, expert]] for expert, part in enumerate(last.parts)]
    changed = [bool((mine - other).abs().max() > 1e-3) for mine, other in zip(parts, dense, strict=True)]
    assert changed == [True, True, False, True]


def test_scores_of_granules_are_those_of_what_comes_kth_in_every_expert(tokens) -> None:
    view = ModelView(build("mixtral"))
    found = torch.from_numpy(granule_scores(view, Calibration(tokens, 2))[FFN])
    gram = down_gram(view, tokens)
    own = wifv(view.last_maps[FFN].weight, gram).view(EXPERTS, WIDTH)
    torch.testing.assert_close(found.view(WIDTH, EXPERTS).T, own.sort(1, descending=True).values)


@pytest.mark.parametrize("criterion", [*CRITERIA, "flap"])
@pytest.mark.parametrize("repaired", ["none", "ridge", "bias"])
def test_an_expert_without_tokens_is_named_and_left_without_repair(deserted, tokens, criterion, repaired) -> None:
    gram, last = down_gram(deserted, tokens), deserted.blocks[0].linears["down"]
    assert deserted.blocks[0].unreached(gram) == ["layers.0.experts.2"]
    weight = last.parts[2].clone()
    order = rank_unit(criterion, deserted.unit_linears(FFN), gram, 0.01).order
    if criterion != "flap":
        assert torch.equal(order[:, 2], weight.square().sum(0).argsort(descending=True))
    kept = [unit.granules for unit in deserted.units]
    kept[FFN] = 12
    unreached = cut(deserted, Allocation(deserted.units, tuple(kept)), tokens, 4, criterion, repaired, 0.01, False)
    assert unreached == ["layers.0.experts.2"]
    assert torch.equal(last.parts[2], weight[:, torch.sort(order[:12, 2]).values])
    assert torch.isfinite(deserted.model(tokens).logits).all()


def test_curvature_is_that_of_the_whole_ffn(case, tokens) -> None:
    """The gradient at the sum over a token's experts, once a token: the stock module's own output."""
    stock, view = build(case), ModelView(build(case))
    stock.set_experts_implementation("eager")
    modules = [layer.mlp.experts for layer in stock.model.layers]
    expected = output_curvature(ModelViewOf(stock), modules, tokens, 2, torch.Generator().manual_seed(5))
    found = output_curvature(view, view.last_maps[1::2], tokens, 2, torch.Generator().manual_seed(5))
    for mine, other in zip(found, expected, strict=True):
        assert mine.mean == pytest.approx(other.mean, rel=1e-4)


class ModelViewOf:
    """What output_curvature reads of a view, with the model untouched."""

    def __init__(self, model) -> None:
        self.model = model


def test_footprint_counts_the_experts_of_a_token(case) -> None:
    model = build(case)
    found = footprint(model)
    assert found.whole == param_count(model)
    view = ModelView(model)
    linears = sum(u.params for u in view.units[::2]) + 3 * 2 * 3 * 24 * WIDTH + 3 * EXPERTS * 24 + 64 * 24
    shared = 3 * (3 * 12 * 24 + 24) if case == "qwen2_moe" else 0
    assert found.macs_per_token == linears + shared


def test_onload_by_block_gives_the_same(case, tokens, uneven, tmp_path) -> None:
    view = ModelView(build(case))
    slice_model(view, uneven(view.units))
    save_model(view.model, None, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m", onload="block")(tokens).logits, view.model(tokens).logits)


def test_damaged_folders_are_refused(tmp_path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    for change, message in (
        (lambda tensors: tensors.pop(name.format(1)), "lack 1 tensors"),
        (lambda tensors: tensors.update({name.format(4): tensors[name.format(0)].clone()}), "there are 4 experts"),
        (lambda tensors: tensors.update({name.format(0): torch.ones(24, 19)}), "of expert 0 of shape"),
    ):
        save_model(build("mixtral"), None, tmp_path / "m")
        edit_tensors(tmp_path / "m", change)
        with pytest.raises(CorruptModel, match=message):
            load_model(tmp_path / "m")


@pytest.mark.parametrize("settings", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts_are_refused(settings) -> None:
    with pytest.raises(UnsupportedArchitecture, match="mlp_only_layers") as refusal:
        family_of(Qwen3MoeConfig(**{**LLAMA, **settings}))
    assert "decoder_sparse_step 1" in refusal.value.change


def test_an_odd_width_runs_in_transformers(tokens, tmp_path) -> None:
    """torch's grouped product cannot have it, even where all layers are alike."""
    view = ModelView(build("mixtral"))
    slice_model(view, [torch.arange(3 if u.kind == "attention" else 7) for u in view.units])
    save_model(view.model, None, tmp_path / "m")
    assert "auto_map" in json.loads((tmp_path / "m/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded(tokens).logits, view.model(tokens).logits, rtol=0, atol=1e-5)
