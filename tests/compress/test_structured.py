from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.compress.levels import Levels
from ffprune.compress.structured import Plan, prepare
from ffprune.core.ridge import repair
from ffprune.core.units import Allocation
from ffprune.models.surgery import copy_model, read_unit, set_unit, slice_model
from ffprune.models.view import ModelView, granule_indices
from tests.oracles.calibration import collect
from tests.tiny import VOCAB, llama, opt, spread

BUILDERS = {"llama": llama, "opt": opt}
DAMPING = 0.01


@pytest.fixture(params=BUILDERS)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return spread(BUILDERS[request.param]()).requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(1))


def orders(view: ModelView) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randperm(unit.granules, generator=draw) for unit in view.units]


def grams(view: ModelView, tokens: Tensor) -> list[Tensor]:
    names = [f"layers.{view.block_of(i).index}.{view.unit_linears(i).last_role}" for i in range(len(view.units))]
    found = collect(view, tokens, names, 2)
    return [xx for name in names if (xx := found[name].xx) is not None]


def cut(view: ModelView, shift: int = 0) -> Allocation:
    """Another number of granules in every unit."""
    return Allocation(view.units, tuple(1 + (5 * i + 7 + shift) % (u.granules - 1) for i, u in enumerate(view.units)))


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def plan_for(model: PreTrainedModel, tokens: Tensor, repaired: bool, dtype: torch.dtype = torch.float32) -> Plan:
    view = ModelView(copy_model(model))
    levels = Levels(view, orders(view), grams(view, tokens), DAMPING) if repaired else None
    return prepare(view, orders(view), levels, dtype)


def sliced(model: PreTrainedModel, allocation: Allocation) -> ModelView:
    view = ModelView(copy_model(model))
    kept = [order[:k] for order, k in zip(orders(view), allocation.kept, strict=True)]
    slice_model(view, kept)
    return view


def test_without_repair_it_is_the_sliced_model(dense: PreTrainedModel, tokens: Tensor) -> None:
    plan = plan_for(dense, tokens, repaired=False)
    for shift in (0, 3, 1):
        allocation = cut(plan.view, shift)
        plan.apply(allocation)
        assert torch.equal(logits(plan.view.model, tokens), logits(sliced(dense, allocation).model, tokens))
        shapes = [plan.view.unit_linears(i).granules for i in range(len(plan.view.units))]
        assert tuple(shapes) == allocation.kept


def test_with_repair_it_is_the_sliced_model_mended_by_ridge(dense: PreTrainedModel, tokens: Tensor) -> None:
    plan = plan_for(dense, tokens, repaired=True)
    original = ModelView(copy_model(dense))
    statistics = grams(original, tokens)
    allocation = cut(plan.view)
    plan.apply(allocation)
    twin = sliced(dense, allocation)
    for i, (order, k) in enumerate(zip(orders(original), allocation.kept, strict=True)):
        parts = original.unit_linears(i)
        columns = granule_indices(order[:k], parts.width[parts.last_role])
        mended = repair(parts.last.weight, statistics[i], columns, DAMPING)
        set_unit(twin, i, read_unit(twin, i).replace_last(mended))
        torch.testing.assert_close(plan.view.unit_linears(i).last.weight, twin.unit_linears(i).last.weight, **CLOSE)
    torch.testing.assert_close(logits(plan.view.model, tokens), logits(twin.model, tokens), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(twin.model, tokens), logits(sliced(dense, allocation).model, tokens), atol=1e-2)


CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize("repaired", [False, True])
def test_the_dense_allocation_is_the_dense_model_again(dense: PreTrainedModel, tokens: Tensor, repaired: bool) -> None:
    plan = plan_for(dense, tokens, repaired)
    whole = Allocation.dense(plan.view.units)
    plan.apply(whole)
    first = logits(plan.view.model, tokens)
    # Channels stand in another order, so sums round differently; nothing else may differ.
    torch.testing.assert_close(first, logits(dense, tokens), rtol=1e-4, atol=1e-5)
    plan.apply(cut(plan.view))
    plan.apply(whole)
    assert torch.equal(logits(plan.view.model, tokens), first)
    for i, order in enumerate(orders(plan.view)):
        exact = read_unit(ModelView(dense), i).select(order)
        for role, weight in read_unit(plan.view, i).weight.items():
            assert torch.equal(weight, exact.weight[role])


def test_a_trial_copies_no_weights(dense: PreTrainedModel, tokens: Tensor) -> None:
    plan = plan_for(dense, tokens, repaired=True)
    plan.apply(cut(plan.view))
    for i, ordered in enumerate(plan.ordered):
        linears = plan.view.unit_linears(i)
        for role, linear in linears.inputs.items():
            assert linear.weight.untyped_storage().data_ptr() == ordered.weight[role].untyped_storage().data_ptr()
            if role in ordered.bias:
                assert linear.bias.untyped_storage().data_ptr() == ordered.bias[role].untyped_storage().data_ptr()
    plain = plan_for(dense, tokens, repaired=False)
    plain.apply(cut(plain.view))
    for i, ordered in enumerate(plain.ordered):
        last = plain.view.unit_linears(i).last.weight
        assert last.untyped_storage().data_ptr() == ordered.weight[ordered.last_role].untyped_storage().data_ptr()


def test_trials_run_in_the_asked_dtype_with_repairs_of_full_precision(dense: PreTrainedModel, tokens: Tensor) -> None:
    plan = plan_for(dense, tokens, repaired=True, dtype=torch.bfloat16)
    exact = plan_for(dense, tokens, repaired=True)
    for each in (plan, exact):
        each.apply(cut(each.view))
    for i in range(len(plan.view.units)):
        found, expected = (each.view.unit_linears(i).last.weight for each in (plan, exact))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.bfloat16())
