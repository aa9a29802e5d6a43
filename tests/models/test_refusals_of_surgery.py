"""Refusals of the calibration walk and of surgery."""

from __future__ import annotations

import pytest
import torch

from ffprune.core.errors import NonFiniteLoss, ParameterError, UnsupportedArchitecture
from ffprune.models.calibration import Calibration
from ffprune.models.surgery import read_unit, slice_model, slice_unit
from ffprune.models.view import ModelView


@pytest.fixture
def view(make_model):
    return ModelView(make_model("llama_gqa"))


def test_the_first_linear_with_infinite_inputs_is_named(view, tokens):
    view.prunable["layers.1.up"].weight[3, 2] = torch.inf
    with pytest.raises(NonFiniteLoss, match=r"inputs of layers\.1\.down"):
        list(Calibration(tokens, 2).grams(view, ()))
    assert not any(m._forward_pre_hooks for m in view.model.modules())


def test_the_head_is_not_run(view, tokens):
    view.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the LM head ran"))
    assert sum(map(len, Calibration(tokens, 2).grams(view, ()))) == len(view.prunable)


def test_batch_size_does_not_matter(view, tokens):
    for one, four in zip(*(Calibration(tokens, size).grams(view) for size in (1, 4)), strict=True):
        for role in view.blocks[0].linears:
            torch.testing.assert_close(one[role].xx, four[role].xx)


def test_empty_windows_are_refused(view, tokens):
    with pytest.raises(ParameterError, match="0, 12"):
        next(Calibration(tokens[:0], 2).grams(view))
    with pytest.raises(ParameterError, match="batch size of at least 1"):
        next(Calibration(tokens, 0).grams(view))


@pytest.mark.parametrize("kept", [[0, 0], [3], [-1]])
def test_granules_that_do_not_exist_are_refused(view, kept):
    with pytest.raises(ParameterError, match="granules 0 to 2"):
        slice_unit(view, 0, torch.tensor(kept))


def test_prefixes_longer_than_the_unit_are_refused(view):
    with pytest.raises(ParameterError, match="There are 20"):
        read_unit(view, 1).prefix(21)


def test_one_list_per_unit(view):
    with pytest.raises(ParameterError, match="6 units"):
        slice_model(view, [torch.tensor([0])])


def test_reading_and_selecting_change_nothing(view, tokens):
    before = view.model(tokens).logits
    weights = read_unit(view, 0)
    chosen = weights.select(torch.tensor([2, 0])).replace_last(torch.zeros(24, 32))
    assert chosen.granules == 2
    assert all(w.is_contiguous() for w in chosen.weight.values())
    assert torch.equal(view.model(tokens).logits, before)


def test_models_that_are_not_causal_language_models_are_refused(view):
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaModel has no 'model\.layers'"):
        ModelView(view.model.model)


def test_projections_that_are_not_linear_are_refused(view):
    view.model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedArchitecture, match=r"mlp\.up_proj.*Identity"):
        ModelView(view.model)
