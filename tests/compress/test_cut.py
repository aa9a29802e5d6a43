"""The final structured pass against the parts it is made of."""

from __future__ import annotations

import pytest
import torch

from ffprune.allocate.uniform import uniform
from ffprune.compress.cut import FLUCTUATION, REPAIRS, cut, rank_unit
from ffprune.core.budget import Bounds
from ffprune.core.errors import ParameterError
from ffprune.core.importance import CRITERIA
from ffprune.core.ridge import repair
from ffprune.core.units import Allocation
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView, granule_indices
from tests.oracles.calibration import collect
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))
BOUNDS = Bounds(0.0, 1.0)


@pytest.fixture(params=["llama_tied", "opt"])
def view(request: pytest.FixtureRequest) -> ModelView:
    return ModelView(spread(MODELS[request.param]()))


def last_outputs(view: ModelView, layer: int, role: str) -> torch.Tensor:
    """What one linear map writes over all windows."""
    seen = []
    hook = view.blocks[layer].linears[role].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.inference_mode():
        view.model(WINDOWS, use_cache=False)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("criterion", [*CRITERIA, FLUCTUATION])
@pytest.mark.parametrize("repaired", sorted(name for name, row in REPAIRS.items() if row.mend))
def test_shapes_follow_the_allocation_and_the_model_runs(view: ModelView, criterion: str, repaired: str) -> None:
    allocation = uniform(view.units, 0.4, BOUNDS)
    cut(view, allocation, WINDOWS, 4, criterion, repaired, 0.01, dense_inputs=False)
    assert [view.unit_linears(i).granules for i in range(len(view.units))] == list(allocation.kept)
    assert torch.isfinite(view.model(WINDOWS, use_cache=False).logits).all()


def test_dense_inputs_repair_as_the_ridge_stage_does(view: ModelView) -> None:
    dense = ModelView(copy_model(view.model))
    allocation = uniform(view.units, 0.4, BOUNDS)
    names = [f"layers.{u.layer}.{dense.unit_linears(i).last_role}" for i, u in enumerate(dense.units)]
    grams = collect(dense, WINDOWS, names, 4)
    cut(view, allocation, WINDOWS, 4, "wanda_column", "ridge", 0.01, dense_inputs=True)
    for index, (name, keep) in enumerate(zip(names, allocation.kept, strict=True)):
        parts, gram = dense.unit_linears(index), grams[name]
        assert gram.xx is not None
        kept = torch.sort(rank_unit("wanda_column", parts, gram, 0.01).order[:keep]).values
        columns = granule_indices(kept, parts.width[parts.last_role])
        wanted = repair(parts.last.weight.detach(), gram.xx, columns, 0.01)
        torch.testing.assert_close(view.unit_linears(index).last.weight.detach(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", [FLUCTUATION, *(name for name, row in CRITERIA.items() if not row.whole)])
def test_what_reads_a_diagonal_cuts_alike_by_a_whole_gram(view: ModelView, criterion: str, monkeypatch) -> None:
    other, allocation = ModelView(copy_model(view.model)), uniform(view.units, 0.4, BOUNDS)
    cut(view, allocation, WINDOWS, 4, criterion, "none", 0.01, dense_inputs=False)
    monkeypatch.setattr("ffprune.compress.cut.reads_whole_gram", lambda criterion, repair: True)
    cut(other, allocation, WINDOWS, 4, criterion, "none", 0.01, dense_inputs=False)
    for mine, theirs in zip(view.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_layers_in_bfloat16_give_nearly_the_same_cut(view: ModelView) -> None:
    other, allocation = ModelView(copy_model(view.model)), uniform(view.units, 0.4, BOUNDS)
    cut(view, allocation, WINDOWS, 4, "wanda_column", "ridge", 0.01, False)
    cut(other, allocation, WINDOWS, 4, "wanda_column", "ridge", 0.01, False, torch.bfloat16)
    mine, theirs = (model(WINDOWS, use_cache=False).logits for model in (view.model, other.model))
    assert mine.dtype == theirs.dtype == torch.float32
    assert 0 < (mine - theirs).norm() < 0.05 * mine.norm()


def test_a_bias_makes_the_mean_output_exact(view: ModelView) -> None:
    """The first unit's input is the dense one, so that its mean output must not move at all."""
    wanted = last_outputs(view, 0, "o").mean(0)
    kept = [unit.granules for unit in view.units]
    kept[0] = 1
    for name in ("bias", "mean+ridge"):
        pruned = ModelView(copy_model(view.model))
        cut(pruned, Allocation(view.units, tuple(kept)), WINDOWS, 4, FLUCTUATION, name, 0.01, dense_inputs=False)
        torch.testing.assert_close(last_outputs(pruned, 0, "o").mean(0), wanted, rtol=1e-3, atol=1e-4)


def test_an_ffn_is_repaired_behind_its_own_cut_attention(view: ModelView) -> None:
    allocation = uniform(view.units, 0.4, BOUNDS)
    dense = ModelView(copy_model(view.model))
    cut(view, allocation, WINDOWS, 4, "wanda_column", "ridge", 0.01, dense_inputs=False)
    # The same by hand for layer 0: attention first, then new statistics, then the FFN.
    first = [unit.granules for unit in dense.units]
    first[0] = allocation.kept[0]
    cut(dense, Allocation(dense.units, tuple(first)), WINDOWS, 4, "wanda_column", "ridge", 0.01, dense_inputs=False)
    gram = collect(dense, WINDOWS, ("layers.0.down",), 4)["layers.0.down"]
    assert gram.xx is not None
    parts = dense.unit_linears(1)
    kept = torch.sort(rank_unit("wanda_column", parts, gram, 0.01).order[: allocation.kept[1]]).values
    wanted = repair(parts.last.weight.detach(), gram.xx, kept, 0.01)
    torch.testing.assert_close(view.unit_linears(1).last.weight.detach(), wanted, rtol=1e-3, atol=1e-4)


def test_unknown_names_are_refused_before_anything_is_cut(view: ModelView) -> None:
    allocation = uniform(view.units, 0.4, BOUNDS)
    for criterion, mend in (("wandacolumn", "ridge"), ("wanda_column", "rigde")):
        with pytest.raises(ParameterError, match="Known names"):
            cut(view, allocation, WINDOWS, 4, criterion, mend, 0.01, dense_inputs=False)
    assert [view.unit_linears(i).granules for i in range(len(view.units))] == [u.granules for u in view.units]
