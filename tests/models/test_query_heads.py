"""Query heads as granules: one of every key/value group goes at a time, and keys and values stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig, PreTrainedModel, Qwen2Config

from ffprune.allocate.uniform import uniform
from ffprune.compress.cut import cut
from ffprune.compress.follow import follow
from ffprune.compress.levels import Levels
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError
from ffprune.core.importance import CRITERIA, rank
from ffprune.core.ridge import repair
from ffprune.core.units import Allocation
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.surgery import copy_model, mask_unit, param_count, read_unit, set_unit, slice_model, slice_unit
from ffprune.models.view import ModelView
from tests.models.conftest import LLAMA, VOCAB
from tests.oracles.calibration import collect
from tests.tiny import character_tokenizer

GQA = {**LLAMA, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GQA, head_dim=6),
    "qwen2": lambda: Qwen2Config(**GQA, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(**GQA),
}
TOKENS = torch.randint(3, VOCAB, (6, 14), generator=torch.Generator().manual_seed(2))
#: Of four granules of two groups, each group keeps others.
KEPT = torch.tensor([[0, 1], [2, 3], [3, 0]])


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def test_a_granule_is_a_head_of_every_group_counted_to_the_last_weight(model: PreTrainedModel) -> None:
    view = ModelView(model, "query")
    block, unit = view.blocks[0], view.units[0]
    assert (unit.granules, block.groups, block.heads) == (4, 2, 8)
    assert unit.params_per_granule == 2 * 2 * block.head_dim * model.config.hidden_size
    whole = param_count(model)
    slice_unit(view, 0, KEPT)
    biases = 2 * block.head_dim if block.linears["q"].bias is not None else 0
    assert whole - param_count(model) == unit.params_per_granule + biases
    assert (block.groups, block.heads, block.heads_per_group) == (2, 6, 3)
    assert unit.params == sum(block.linears[role].weight.numel() for role in "qkvo") + unit.params_per_granule
    assert view.granule_macs(10)[0] == unit.params_per_granule + 2 * 2 * block.head_dim * 10


def test_keys_and_values_count_in_the_share_that_is_asked_for(model: PreTrainedModel) -> None:
    by_group, by_query = ModelView(copy_model(model)), ModelView(copy_model(model), "query")
    assert by_query.prunable_params == by_group.prunable_params
    whole = param_count(model)
    policy = uniform(by_query.units, 0.2, Bounds(0.1, 1.0))
    slice_model(by_query, [torch.arange(kept) for kept in policy.kept])
    gone = 1 - (param_count(by_query.model) - (whole - by_group.prunable_params)) / by_group.prunable_params
    channel = 3 * model.config.hidden_size / by_group.prunable_params
    assert policy.sparsity == policy.saved
    assert 0.2 <= policy.sparsity < 0.2 + channel
    assert gone == pytest.approx(policy.sparsity, abs=0.01), "biases go too, uncounted"
    assert Allocation.from_rows(policy.to_rows()) == policy


def test_masked_equals_sliced_whichever_heads_a_group_keeps(model: PreTrainedModel) -> None:
    dense = logits(model)
    for kept in (KEPT, KEPT[:1], torch.tensor([1, 3])):
        sliced, masked = (ModelView(copy_model(model), "query") for _ in range(2))
        slice_unit(sliced, 0, kept)
        mask_unit(masked, 0, kept)
        torch.testing.assert_close(logits(sliced.model), logits(masked.model), rtol=0, atol=1e-5)
        assert (logits(sliced.model) - dense).abs().max() > 1e-4


def test_prefixes_of_ordered_weights_equal_slicing(model: PreTrainedModel) -> None:
    view, twin = ModelView(model, "query"), ModelView(copy_model(model), "query")
    order = torch.stack([torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 2, 0])], 1)
    set_unit(view, 0, read_unit(view, 0).select(order).prefix(2))
    slice_unit(twin, 0, order[:2])
    torch.testing.assert_close(logits(view.model), logits(twin.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_group_has_an_order_of_its_own(model: PreTrainedModel, criterion: str) -> None:
    view = ModelView(model, "query")
    gram = collect(view, TOKENS, ["layers.0.o"], 3)["layers.0.o"]
    parts = view.unit_linears(0)
    found = rank(criterion, parts.last.weight.detach(), gram.xx, parts.width["o"], 0.01, parts.runs)
    assert found.order.shape == (4, 2)
    assert [sorted(run) for run in found.order.T.tolist()] == [[0, 1, 2, 3]] * 2
    assert found.error[-1] == 0
    assert (found.error[:-1] >= found.error[1:]).all()
    # The first head to go is the one that is worst in its group, as if the other group had lost none.
    alone = rank(criterion, parts.last.weight.detach(), gram.xx, view.blocks[0].head_dim, 0.01)
    first = next(head for head in alone.order.flip(0).tolist() if head < 4)
    assert found.order[-1, 0] == first


def test_the_bank_repairs_the_columns_that_stay(model: PreTrainedModel) -> None:
    view = ModelView(model, "query")
    orders = [torch.arange(unit.granules).flip(0) for unit in view.units]
    orders[0] = torch.stack([torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 2, 0])], 1)
    names = [f"layers.{u.layer}.{view.unit_linears(i).last_role}" for i, u in enumerate(view.units)]
    grams = collect(view, TOKENS, names, 3)
    xx = [grams[name].xx for name in names]
    found = Levels(view, orders, xx, 0.01).make(0, 3)
    parts = view.unit_linears(0)
    wanted = repair(parts.last.weight.detach(), xx[0], parts.columns(orders[0][:3]), 0.01)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("repaired", ["none", "ridge", "stream"])
def test_a_cut_model_is_saved_and_comes_back(model: PreTrainedModel, repaired: str, tmp_path: Path) -> None:
    view = ModelView(model, "query")
    allocation = uniform(view.units, 0.3, Bounds(0.0, 1.0))
    if repaired == "stream":
        follow(view, allocation, TOKENS, 1, "compensated_elimination", 0.01)
    else:
        cut(view, allocation, TOKENS, 3, "wanda_column", repaired, 0.01, dense_inputs=False)
    assert [block.heads for block in view.blocks] == [2 * kept for kept in allocation.kept[::2]]
    assert {block.groups for block in view.blocks} == {2}
    save_model(view.model, character_tokenizer(), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    # Phi-3's projections are one product in the folder and several in the view: the last bit may differ.
    torch.testing.assert_close(logits(loaded), logits(view.model), rtol=0, atol=1e-6)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TOKENS[:1])}
    cached = loaded.generate(TOKENS[:1], use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(TOKENS[:1], use_cache=False, **options))


def test_slicing_by_heads_leaves_the_cache_of_keys_and_values(model: PreTrainedModel) -> None:
    view = ModelView(model, "query")
    slice_model(view, [KEPT if unit.kind == "attention" else torch.arange(unit.granules) for unit in view.units])
    cache = view.model(TOKENS, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {2}


def test_a_model_without_groups_is_refused() -> None:
    mha = AutoModelForCausalLM.from_config(LlamaConfig(**{**GQA, "num_key_value_heads": 8}))
    with pytest.raises(ParameterError, match="LlamaForCausalLM.*head of its own.*units.heads to group"):
        ModelView(mha, "query")
