"""Fisher curvature of the loss in every unit's output."""

from __future__ import annotations

import math

import pytest
import torch

from ffprune.core.errors import NonFiniteLoss
from ffprune.models.curvature import output_curvature
from ffprune.models.view import ModelView
from tests.oracles import curvature as oracle


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["llama_gqa", "opt", "opt_350m"])
def view(request, make_model):
    return ModelView(make_model(request.param))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_it_is_the_per_token_gradient_at_every_unit(view, tokens, batch_size):
    found = output_curvature(view, view.last_maps, tokens, batch_size, seeded())
    expected = oracle.fisher_traces(view, tokens, batch_size, seeded())
    assert len(found) == len(view.units)
    for curvature, windows in zip(found, expected, strict=True):
        assert curvature.mean == pytest.approx(float(windows.mean()), rel=1e-3)
        assert curvature.stderr == pytest.approx(float(windows.std()) / math.sqrt(len(windows)), rel=1e-2)


def test_it_is_positive_and_the_generators(view, tokens):
    first, again, other = (output_curvature(view, view.last_maps, tokens, 2, seeded(seed)) for seed in (3, 3, 4))
    assert all(c.mean > 0 and c.stderr > 0 for c in first)
    assert first == again
    assert first != other


def test_the_model_is_left_as_it_was(view, tokens):
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    told = []
    output_curvature(view, view.last_maps, tokens, 3, seeded(), lambda done, total: told.append((done, total)))
    assert told == [(3, 4), (4, 4)]
    for name, tensor in view.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and not p.requires_grad for p in view.model.parameters())
    assert not any(m._forward_hooks for m in view.model.modules())


def test_one_window_has_no_standard_error(make_model, tokens):
    view = ModelView(make_model("llama_gqa"))
    found = output_curvature(view, view.last_maps, tokens[:1], 1, seeded())
    assert all(c.stderr == math.inf for c in found)


def test_a_gradient_that_is_not_finite_is_refused(make_model, tokens):
    view = ModelView(make_model("llama_gqa"))

    def break_gradient(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    view.unit_linears(5).last.register_forward_hook(break_gradient)
    with pytest.raises(NonFiniteLoss, match="gradient"):
        output_curvature(view, view.last_maps, tokens, 4, seeded())
