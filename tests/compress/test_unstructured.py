"""Unstructured pruning of whole models: exact counts, definitions, sequential statistics, trial masks."""

from __future__ import annotations

import pytest
import torch

from ffprune.allocate.uniform import uniform
from ffprune.compress.unstructured import Quantisation, WeightPruning, prepare, prune
from ffprune.core.budget import Bounds
from ffprune.core.units import Allocation
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView
from tests.oracles.calibration import collect
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))


def how(
    criterion: str = "wanda",
    reconstruct: bool = False,
    pattern: str | None = None,
    bits: int = 0,
    weighted: bool = False,
) -> WeightPruning:
    return WeightPruning(criterion, reconstruct, pattern, Quantisation(bits, 8) if bits else None, 0.01, weighted)


@pytest.fixture(params=["llama_tied", "opt"])
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()))


def uneven(view: ModelView) -> Allocation:
    units = view.weight_units
    return Allocation(units, tuple(u.granules * (3 + i % 5) // 10 + i for i, u in enumerate(units)))


@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obd", "obs", "isc"])
def test_every_matrix_keeps_exactly_what_the_allocation_says(
    view: ModelView, criterion: str, reconstruct: bool
) -> None:
    allocation = uneven(view)
    facts = prune(view, allocation, WINDOWS, 4, how(criterion, reconstruct), dense_inputs=False)
    counts = [int((linear.weight != 0).sum()) for linear in view.prunable.values()]
    # Reconstruction can leave a kept weight at 0 only where its input never fires.
    dead = collect(view, WINDOWS, (), 4)
    alive = [bool((dead[name].diag > 0).all()) for name in view.prunable]
    assert [m.kept for m in facts] == list(allocation.kept)
    assert all(c == k for c, k, lives in zip(counts, allocation.kept, alive, strict=True) if lives)


@pytest.mark.parametrize(("reconstruct", "bits"), [(False, 0), (True, 0), (True, 4)])
def test_weighted_tokens_choose_other_weights_and_as_many(view: ModelView, reconstruct: bool, bits: int) -> None:
    allocation, other = uneven(view), ModelView(copy_model(view.model))
    facts = prune(view, allocation, WINDOWS, 4, how("obd", reconstruct, bits=bits), dense_inputs=False)
    weighted = how("obd", reconstruct, bits=bits, weighted=True)
    assert [m.kept for m in prune(other, allocation, WINDOWS, 4, weighted, False)] == [m.kept for m in facts]
    pairs = zip(view.prunable.values(), other.prunable.values(), strict=True)
    assert any(not torch.equal(one.weight, two.weight) for one, two in pairs)


def test_wanda_is_its_definition_on_inputs_behind_pruned_layers(view: ModelView) -> None:
    dense = copy_model(view.model)
    allocation = uniform(view.weight_units, 0.5, Bounds(0, 1))
    prune(view, allocation, WINDOWS, 4, how(), dense_inputs=False)
    # Layer 1's inputs, with layer 0 pruned and layer 1 still dense.
    half = ModelView(dense)
    with torch.no_grad():
        for role, linear in half.blocks[0].linears.items():
            linear.weight.copy_(view.blocks[0].linears[role].weight)
    grams = collect(half, WINDOWS, (), 4)
    for role, linear in half.blocks[1].linears.items():
        scores = linear.weight.abs() * grams[f"layers.1.{role}"].diag.sqrt().float()
        removed = scores.argsort(dim=1, stable=True)[:, : linear.in_features // 2]
        wanted = linear.weight.detach().scatter(1, removed, 0)
        torch.testing.assert_close(view.blocks[1].linears[role].weight.detach(), wanted)


def test_dense_inputs_are_the_dense_models(view: ModelView) -> None:
    dense = ModelView(copy_model(view.model))
    prune(view, uniform(view.weight_units, 0.5, Bounds(0, 1)), WINDOWS, 4, how(), dense_inputs=True)
    grams = collect(dense, WINDOWS, (), 4)
    for name, linear in dense.prunable.items():
        scores = linear.weight.abs() * grams[name].diag.sqrt().float()
        removed = scores.argsort(dim=1, stable=True)[:, : linear.in_features // 2]
        torch.testing.assert_close(view.prunable[name].weight.detach(), linear.weight.detach().scatter(1, removed, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_patterns_hold_everywhere(view: ModelView, pattern: str, reconstruct: bool) -> None:
    allocation = uniform(view.weight_units, 0.5, Bounds(0, 1))
    prune(view, allocation, WINDOWS, 4, how("obs", reconstruct, pattern), dense_inputs=False)
    stay, group = (int(part) for part in pattern.split(":"))
    for linear in view.prunable.values():
        assert int((linear.weight.view(-1, group) != 0).sum(1).max()) <= stay


def test_quantisation_keeps_the_zeros_and_uses_few_levels(view: ModelView) -> None:
    allocation = uniform(view.weight_units, 0.5, Bounds(0, 1))
    prune(view, allocation, WINDOWS, 4, how("obs", True, bits=3), dense_inputs=False)
    for linear in view.prunable.values():
        groups = linear.weight.detach().view(linear.out_features, -1, 8)
        assert all(len(group.unique()) <= 8 for row in groups for group in row)
        assert int((linear.weight == 0).sum()) >= linear.weight.numel() // 2


def test_reconstruction_leaves_less_error_than_a_mask(view: ModelView) -> None:
    dense, allocation = copy_model(view.model), uniform(view.weight_units, 0.5, Bounds(0, 1))
    xx = collect(view, WINDOWS, list(view.prunable), 4)["layers.0.down"].xx
    assert xx is not None
    errors = {}
    for reconstruct in (False, True):
        other = ModelView(copy_model(dense))
        prune(other, allocation, WINDOWS, 4, how("obs", reconstruct), dense_inputs=True)
        change = other.prunable["layers.0.down"].weight.detach() - view.prunable["layers.0.down"].weight.detach()
        errors[reconstruct] = float((change @ xx * change).sum())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_trial_masks_are_those_of_dense_inputs(view: ModelView, criterion: str) -> None:
    allocation, other = uneven(view), uniform(view.weight_units, 0.3, Bounds(0, 1))
    twin = ModelView(copy_model(view.model))
    prune(twin, allocation, WINDOWS, 4, how(criterion), dense_inputs=True)
    plan = prepare(view, collect(view, WINDOWS, list(view.prunable), 4), criterion, 0.01, torch.float32)
    plan.apply(other)
    plan.apply(allocation)  # the second policy must not see the first
    for name, linear in view.prunable.items():
        torch.testing.assert_close(linear.weight.detach(), twin.prunable[name].weight.detach())
    plan.apply(Allocation.dense(view.weight_units))
    for linear, dense in zip(view.prunable.values(), plan.weights, strict=True):
        assert torch.equal(linear.weight, dense)


def test_magnitude_asks_the_model_nothing(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffprune.compress.unstructured.BlockWalk", lambda *given: pytest.fail("the model was run"))
    facts = prune(view, uneven(view), WINDOWS, 4, how("magnitude"), dense_inputs=False)
    assert [m.kept for m in facts] == list(uneven(view).kept)
    with pytest.raises(pytest.fail.Exception):
        prune(view, uneven(view), WINDOWS, 4, how("wanda"), dense_inputs=False)
