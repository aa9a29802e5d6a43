"""The block-by-block walk against the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.models.blocks import BlockWalk
from ffprune.models.view import ModelView
from ffprune.models.watch import watch_weighted
from tests.oracles.calibration import collect
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(MODELS))
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()))


def test_walks_as_the_model_runs(view: ModelView) -> None:
    walk = BlockWalk(view, WINDOWS, batch_size=2)  # the last batch is smaller
    expected = []
    hooks = [b.layer.register_forward_hook(lambda m, a, out: expected.append(out)) for b in view.blocks]
    with torch.inference_mode():
        view.model(WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for wanted in expected:
        walk.advance()
        torch.testing.assert_close(walk.hidden, wanted)
    assert walk.position == len(view.blocks)


def test_observes_what_the_whole_walk_collects(view: ModelView) -> None:
    whole = collect(view, WINDOWS, list(view.prunable), 2)
    walk = BlockWalk(view, WINDOWS, batch_size=2)
    for block in view.blocks:
        grams, outputs = walk.observe(full=("q", "down"))
        assert set(grams) == set(block.linears)
        assert grams["q"] is grams["k"] is grams["v"]
        assert grams["o"].xx is None
        for role in ("q", "down"):
            torch.testing.assert_close(grams[role].xx, whole[f"layers.{block.index}.{role}"].xx, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grams["o"].diag, whole[f"layers.{block.index}.o"].diag, rtol=1e-4, atol=1e-6)
        walk.advance(outputs)


@pytest.mark.parametrize("role", ["o", "down"])
def test_what_arrives_at_a_map_needs_no_layer_behind_it(view: ModelView, role: str, monkeypatch) -> None:
    walk = BlockWalk(view, WINDOWS, batch_size=2)
    walk.advance()
    wanted = walk.observe((role,))[0][role]
    monkeypatch.setattr(view.blocks[1].linears[role], "forward", lambda _: pytest.fail("the map itself ran"))
    found, light = walk.arriving(role, whole=True), walk.arriving(role, whole=False)
    assert torch.equal(found.xx, wanted.xx)
    assert found.count == wanted.count
    assert light.xx is None
    torch.testing.assert_close(light.diag, wanted.diag, rtol=1e-5, atol=1e-6)
    assert torch.equal(light.mean, wanted.mean)
    assert not any(module._forward_pre_hooks for module in view.model.modules())


def test_weights_tokens_by_their_squared_jacobian(view: ModelView) -> None:
    """Against a backward pass for every entry of the unit's output; signs are right on average."""
    walk = BlockWalk(view, WINDOWS[:1], batch_size=1)
    walk.advance()
    block = walk.view.blocks[1]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(role: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            last = role in ("o", "down")
            seen[role] = inputs[0].detach(), output if last else output.detach().requires_grad_(True)
            return seen[role][1]

        return hook

    hooks = [linear.register_forward_hook(keep(role)) for role, linear in block.linears.items()]
    with torch.enable_grad():
        walk.forward(walk.hidden, 0)
    for handle in hooks:
        handle.remove()
    roles = [role for role in seen if role not in ("o", "down")]
    average = dict.fromkeys(roles, 0.0)
    for seed in range(60):
        with watch_weighted(view, 1, (), seed) as grams, torch.enable_grad():
            walk.forward(walk.hidden, 0)
        average = {role: average[role] + grams[f"layers.1.{role}"].diag / 60 for role in roles}
    for role in roles:
        inputs, leaf = seen[role]
        end = seen["o" if role in "qkv" else "down"][1]
        weights = torch.zeros(leaf.shape[:-1])
        for entry in end.flatten():
            weights += torch.autograd.grad(entry, leaf, retain_graph=True)[0].square().sum(-1)
        exact = (weights[..., None] * inputs.square()).flatten(0, -2).sum(0).double()
        torch.testing.assert_close(average[role], exact, rtol=0.35, atol=0.05 * float(exact.mean()))


def test_weighted_tokens_leave_the_last_maps_and_the_outputs_alone(view: ModelView) -> None:
    walk = BlockWalk(view, WINDOWS, batch_size=2)
    plain, outputs = walk.observe(full=tuple(view.blocks[0].linears))
    weighted, same = walk.observe(full=tuple(view.blocks[0].linears), weighted=True)
    torch.testing.assert_close(same, outputs)
    assert not same.requires_grad
    assert set(weighted) == set(plain)
    for role in ("o", "down"):
        torch.testing.assert_close(weighted[role].xx, plain[role].xx)
    assert weighted["q"] is not weighted["v"]
    assert not torch.allclose(weighted["v"].xx, plain["v"].xx, rtol=0.1)


def test_later_layers_see_a_changed_layer(view: ModelView) -> None:
    walk, dense = BlockWalk(view, WINDOWS, 5), BlockWalk(view, WINDOWS, 5)
    _, outputs = walk.observe()
    with torch.no_grad():
        view.blocks[0].linears["down"].weight.zero_()
    walk.advance()
    dense.advance(outputs)
    assert not torch.allclose(walk.hidden, dense.hidden)


def test_replaced_weights_carry_gradients_and_leave_the_layer_alone(view: ModelView) -> None:
    walk = BlockWalk(view, WINDOWS, 5)
    own = view.blocks[0].linears["down"].weight.detach().clone()
    halved = (own / 2).requires_grad_(True)
    output = walk.forward(walk.hidden, 0, {"down": halved})
    output.square().sum().backward()
    assert halved.grad is not None
    assert halved.grad.abs().sum() > 0
    torch.testing.assert_close(view.blocks[0].linears["down"].weight, own)
    with torch.no_grad():
        view.blocks[0].linears["down"].weight.copy_(halved)
    torch.testing.assert_close(walk.forward(walk.hidden, 0), output)


def test_refuses_no_windows(view: ModelView) -> None:
    with pytest.raises(ParameterError, match="windows"):
        BlockWalk(view, WINDOWS[:0], 1)


@pytest.fixture(params=sorted(MODELS.keys() - {"opt_projected"}))
def pre_norm(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()))


def test_the_stream_behind_a_unit_is_what_a_layer_with_nothing_after_it_answers(pre_norm: ModelView) -> None:
    view = pre_norm
    walk = BlockWalk(view, WINDOWS, batch_size=2)
    streams = walk.streams()
    down = view.blocks[0].linears["down"]
    whole = walk.observe()[1]
    torch.testing.assert_close(streams["down"], whole)
    with torch.no_grad():
        down.weight.zero_()
        if down.bias is not None:
            down.bias.zero_()
    torch.testing.assert_close(streams["o"], walk.observe()[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["o", "down"])
def test_the_distance_from_ones_own_stream_is_nothing(pre_norm: ModelView, role: str) -> None:
    walk = BlockWalk(pre_norm, WINDOWS, batch_size=1)
    target = walk.streams()[role]
    distance = walk.distance(role, target)
    # What only a layer's last map is asked for is not kept behind the attention.
    assert (distance.end is None) == (role == "o")
    if distance.end is not None:
        torch.testing.assert_close(torch.cat(distance.end.stream), target)
        assert len(distance.end.inputs) == len(WINDOWS)
    for moments, tokens in ((distance.fit, 4 * 12), (distance.held, 12)):
        assert moments.gram.count == tokens
        assert float(moments.cross.abs().max()) < 1e-3
    # A target that is off by the same vector everywhere: its product with the sum of the inputs.
    shift = torch.arange(target.shape[-1], dtype=torch.float32)
    fit = walk.distance(role, target + shift).fit
    torch.testing.assert_close(fit.cross, torch.outer(shift, fit.gram.total.float()), rtol=1e-2, atol=1e-2)


def test_a_layer_that_norms_its_sums_is_refused() -> None:
    walk = BlockWalk(ModelView(spread(MODELS["opt_projected"]())), WINDOWS, batch_size=2)
    with pytest.raises(UnsupportedArchitecture, match="repair ridge"):
        walk.streams()
