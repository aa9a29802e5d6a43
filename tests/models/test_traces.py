"""Hutchinson's traces of a whole model against the explicit Hessian of its loss."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from ffprune.core.hutchinson import Product
from ffprune.models.traces import matrix_traces
from ffprune.models.view import ModelView
from tests.tiny import VOCAB, llama, spread

WINDOWS = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(1))


def double() -> ModelView:
    return ModelView(spread(llama()).double())


@functools.cache
def explicit(name: str) -> float:
    """The trace of the Hessian of the mean cross-entropy in one matrix, from all its second derivatives."""
    view = double()
    view.model.set_attn_implementation("eager")
    linear = view.prunable[name]
    weight = linear.weight.detach()
    # Diagonal entries alone: one double derivative each.
    flat = weight.clone().flatten().requires_grad_(True)

    def loss(values: torch.Tensor) -> torch.Tensor:
        module, _, leaf = next(n for n, m in view.model.named_modules() if m is linear).rpartition(".")
        replaced = {f"{module}.{leaf}.weight": values.view_as(weight)}
        logits = torch.func.functional_call(view.model, replaced, (WINDOWS,), {"use_cache": False}).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())

    (gradient,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
    rows = [torch.autograd.grad(gradient[i], flat, retain_graph=True)[0][i] for i in range(len(flat))]
    return float(torch.stack(rows).sum())


@pytest.mark.slow
@pytest.mark.parametrize("product", ["exact", "finite_difference"])
def test_traces_are_the_explicit_hessians_within_their_stated_error(product: Product) -> None:
    view = double()
    found = matrix_traces(view, WINDOWS, 2, 60, product, torch.Generator().manual_seed(0))
    assert set(found) == set(view.prunable)
    for name in ("layers.0.q", "layers.1.v", "layers.1.o"):
        estimate, wanted = found[name], explicit(name)
        # Four standard errors: three matrices and two products at a chance of 1 in 15,000 each.
        assert abs(estimate.mean - wanted) < 4 * estimate.stderr, (name, estimate, wanted)
        assert estimate.stderr < 2 * abs(wanted) + 1, "an error bar that says nothing"


def test_the_model_is_left_as_it_was() -> None:
    view = ModelView(spread(llama()))
    before = {name: linear.weight.detach().clone() for name, linear in view.prunable.items()}
    implementation = view.model.config._attn_implementation
    told = []
    matrix_traces(view, WINDOWS, 2, 2, "finite_difference", torch.Generator().manual_seed(0), lambda: told.append(1))
    assert view.model.config._attn_implementation == implementation
    assert told
    for name, linear in view.prunable.items():
        assert torch.equal(linear.weight, before[name])
        assert not linear.weight.requires_grad
