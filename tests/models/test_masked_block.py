"""Layers that compute with masked weights, against models whose weights were masked in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.masks import mask_from_ranks
from ffprune.models.blocks import BlockWalk
from ffprune.models.masked_block import masked_errors, prune_in_turn
from ffprune.models.view import ModelView
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(1))
Errors = list[Callable[[Mapping[str, Tensor]], Tensor]]


@pytest.fixture(params=sorted(MODELS))
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()))


def layer_outputs(model: PreTrainedModel) -> list[Tensor]:
    """What every decoder layer answers to the windows."""
    found: list[Tensor] = []
    hooks = [b.layer.register_forward_hook(lambda m, a, out: found.append(out)) for b in ModelView(model).blocks]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def relative(output: Tensor, wanted: Tensor) -> float:
    """Mean over features of squared error over squared norm, float64."""
    shares = []
    for feature in range(wanted.shape[-1]):
        off = (output[..., feature] - wanted[..., feature]).double()
        shares.append(float(off.square().sum() / wanted[..., feature].double().square().sum()))
    return sum(shares) / len(shares)


def halves(view: ModelView, layer: int) -> dict[str, Tensor]:
    """A mask for every matrix of a layer, half of it 0."""
    draw = torch.Generator().manual_seed(layer)
    return {
        role: (torch.rand(linear.weight.shape, generator=draw) < 0.5).float()
        for role, linear in view.blocks[layer].linears.items()
    }


def set_masks(model: PreTrainedModel, layer: int, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for role, linear in ModelView(model).blocks[layer].linears.items():
            linear.weight.mul_(masks[role])


def test_the_error_is_that_of_a_layer_pruned_in_place(view: ModelView) -> None:
    dense, pruned = layer_outputs(view.model), deepcopy(view.model)
    masks = halves(view, 0)
    set_masks(pruned, 0, masks)
    outputs = layer_outputs(pruned)
    walk = BlockWalk(view, WINDOWS, batch_size=2)
    errors = masked_errors(walk, dense[0])
    assert len(errors) == 3  # the last batch is smaller
    for error, rows in zip(errors, walk.batches, strict=True):
        found = error(masks)
        assert found.item() == pytest.approx(relative(outputs[0][rows], dense[0][rows]), rel=1e-4)
        assert found.item() > 0.001
        assert error({}).item() == pytest.approx(0, abs=1e-10)
        assert error({"down": masks["down"]}).item() > 0


def test_gradients_reach_the_masks_and_nothing_else(view: ModelView) -> None:
    before = deepcopy(view.model.state_dict())
    walk = BlockWalk(view, WINDOWS, 5)
    (error,) = masked_errors(walk, layer_outputs(view.model)[0])
    masks = {role: mask.requires_grad_() for role, mask in halves(view, 0).items()}
    error(masks).backward(inputs=list(masks.values()))
    for role, mask in masks.items():
        assert mask.grad is not None, role
        assert mask.grad.abs().sum() > 0, role
        # Weights that are gone have a slope too: the use of bringing them back.
        assert mask.grad[mask == 0].abs().sum() > 0, role
    assert all(parameter.grad is None for parameter in view.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.model.state_dict().items())


def test_the_slope_of_a_mask_is_the_errors(view: ModelView) -> None:
    view.model.double()
    walk = BlockWalk(view, WINDOWS, 5)
    (error,) = masked_errors(walk, layer_outputs(view.model)[0])
    masks = halves(view, 0)
    mask = masks["up"].double().requires_grad_()
    error({**masks, "up": mask}).backward(inputs=[mask])
    assert mask.grad is not None
    way = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))
    ahead, behind = (error({**masks, "up": masks["up"] + h * way}).item() for h in (1e-3, -1e-3))
    assert float((mask.grad * way).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=2e-2, abs=1e-5)


def test_layers_are_learnt_behind_pruned_ones_and_the_model_stays_dense(view: ModelView) -> None:
    before = deepcopy(view.model.state_dict())
    pruned = deepcopy(view.model)
    told: list[tuple[int, int]] = []

    def learn(ranks: Mapping[str, Tensor], errors: Errors) -> dict[str, float]:
        layer = len(told)
        wanted = layer_outputs(pruned)[layer]
        masks = {role: mask_from_ranks(order, order.numel() // 2, "row") for role, order in ranks.items()}
        set_masks(pruned, layer, masks)
        outputs = layer_outputs(pruned)[layer]
        for error, rows in zip(errors, (slice(0, 2), slice(2, 4), slice(4, 5)), strict=True):
            assert error(masks).item() == pytest.approx(relative(outputs[rows], wanted[rows]), rel=1e-3)
        return dict.fromkeys(ranks, 0.5)

    found = prune_in_turn(view, WINDOWS, 2, learn, lambda done, total: told.append((done, total)))
    assert found == dict.fromkeys(view.prunable, 0.5)
    assert told == [(1, 2), (2, 2)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.model.state_dict().items())


def test_weights_go_in_wandas_order(view: ModelView) -> None:
    walk = BlockWalk(view, WINDOWS, 5)
    grams, _ = walk.observe()
    orders: list[Mapping[str, Tensor]] = []

    def learn(ranks: Mapping[str, Tensor], errors: Errors) -> dict[str, float]:
        orders.append(ranks)
        return dict.fromkeys(ranks, 0.25)

    prune_in_turn(view, WINDOWS, 5, learn)
    for role, order in orders[0].items():
        weight = view.blocks[0].linears[role].weight.detach()
        score = weight.abs() * grams[role].diag.sqrt().float()
        falling = torch.gather(score, 1, order.long().argsort(1))
        assert torch.all(falling[:, :-1] >= falling[:, 1:]), role
