"""The pass that follows the dense model's residual stream."""

from __future__ import annotations

import pytest
import torch

from ffprune.allocate.uniform import uniform
from ffprune.compress.cut import cut
from ffprune.compress.follow import follow
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.stream import DAMPINGS
from ffprune.core.units import Allocation
from ffprune.models.blocks import BlockWalk
from ffprune.models.surgery import copy_model, read_unit, set_unit
from ffprune.models.view import ModelView
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["llama_tied", "opt"])
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()).requires_grad_(False))


def policy(view: ModelView) -> Allocation:
    return uniform(view.units, 0.4, Bounds(0.0, 1.0))


def answer(view: ModelView) -> torch.Tensor:
    return view.model.get_decoder()(WINDOWS, use_cache=False).last_hidden_state


def test_it_ends_nearer_to_the_dense_model_than_ridge(view: ModelView) -> None:
    """On the text it learns from, and with the same damping: one batch leaves none to choose it on."""
    wanted, off = answer(view), {}
    for name in ("ridge", "stream"):
        pruned = ModelView(copy_model(view.model))
        if name == "ridge":
            cut(pruned, policy(view), WINDOWS, len(WINDOWS), "wanda_column", "ridge", 0.01, dense_inputs=False)
        else:
            follow(pruned, policy(view), WINDOWS, len(WINDOWS), "wanda_column", 0.01)
        off[name] = float((answer(pruned) - wanted).norm())
    assert off["stream"] < 0.95 * off["ridge"]


def test_shapes_follow_the_allocation_and_dampings_are_chosen(view: ModelView) -> None:
    allocation = policy(view)
    found = follow(view, allocation, WINDOWS, 2, "compensated_elimination", 0.01)
    assert [view.unit_linears(i).granules for i in range(len(view.units))] == list(allocation.kept)
    cuts = {u.name for u, kept in zip(view.units, allocation.kept, strict=True) if kept < u.granules}
    assert found.keys() == cuts
    assert set(found.values()) <= set(DAMPINGS)
    assert torch.isfinite(view.model(WINDOWS, use_cache=False).logits).all()


def test_layers_may_multiply_in_another_dtype(view: ModelView) -> None:
    exact = ModelView(copy_model(view.model))
    follow(exact, policy(view), WINDOWS, 2, "wanda_column", 0.01)
    follow(view, policy(view), WINDOWS, 2, "wanda_column", 0.01, torch.bfloat16)
    assert {parameter.dtype for parameter in view.model.parameters()} == {torch.float32}
    wanted = answer(exact)
    assert float((answer(view) - wanted).norm()) < 0.2 * float(wanted.norm())


def test_orders_that_are_given_are_not_ranked_again(view: ModelView) -> None:
    allocation = policy(view)
    reverse = [torch.arange(unit.granules - 1, -1, -1) for unit in view.units]
    up = view.blocks[1].linears["up"].weight.detach().clone()
    follow(view, allocation, WINDOWS, 2, reverse, 0.01)
    assert torch.equal(view.blocks[1].linears["up"].weight, up[-allocation.kept[3] :])


def test_the_stream_behind_a_replaced_map_is_what_the_layer_then_answers(view: ModelView) -> None:
    walk = BlockWalk(view, WINDOWS, 2)
    end = walk.distance("down", walk.hidden).end
    assert end is not None
    columns, last = torch.tensor([4, 0, 2]), view.unit_linears(1).last
    weight = torch.randn(last.out_features, 3, generator=torch.Generator().manual_seed(0))
    expected = end.replaced(last, columns, weight)
    set_unit(view, 1, read_unit(view, 1).select(columns).replace_last(weight))
    torch.testing.assert_close(expected, walk.streams()["down"], rtol=1e-4, atol=1e-4)


def test_a_family_that_norms_its_sums_and_an_unknown_criterion_are_refused(view: ModelView) -> None:
    with pytest.raises(ParameterError, match="Known names"):
        follow(view, policy(view), WINDOWS, 2, "wandacolumn", 0.01)
    projected = ModelView(spread(MODELS["opt_projected"]()))
    with pytest.raises(UnsupportedArchitecture, match="repair ridge"):
        follow(projected, policy(projected), WINDOWS, 2, "wanda_column", 0.01)
