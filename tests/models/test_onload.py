"""Layers that take turns on the device: what is where, that nothing moves in the numbers, what becomes of changes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ffprune.compress.cut import cut
from ffprune.compress.follow import follow
from ffprune.core.errors import ParameterError
from ffprune.core.units import Allocation
from ffprune.models import blocks, surgery, watch
from ffprune.models.blocks import BlockWalk
from ffprune.models.calibration import Calibration
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.masked_block import prune_in_turn
from ffprune.models.onload import Onload
from ffprune.models.surgery import copy_model, light_copy, slice_unit
from ffprune.models.view import ModelView
from tests.tiny import MODELS, VOCAB, spread

WINDOWS = torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model stored as float16: on the device, in float32, a layer can be told from one at rest."""
    save_model(spread(MODELS[request.param]()), None, tmp_path / "m", torch.float16)
    return tmp_path / "m"


def both(folder: Path) -> tuple[ModelView, ModelView]:
    return ModelView(load_model(folder)), ModelView(load_model(folder, onload="block"))


def let_go(view: ModelView) -> None:
    assert view.onload is not None
    view.onload.release()


def on_device(view: ModelView) -> list[int]:
    """Layers of which any weight is on the device."""
    return [block.index for block in view.blocks if any(w.dtype == torch.float32 for w in block.layer.parameters())]


def watched(view: ModelView) -> list[tuple[int, list[int]]]:
    """A list that grows whenever a linear runs: its layer, and the layers on the device."""
    seen: list[tuple[int, list[int]]] = []
    for block in view.blocks:
        for linear in block.linears.values():
            linear.register_forward_hook(lambda *_, own=block.index: seen.append((own, on_device(view))))
    return seen


def test_one_layer_at_a_time_is_on_the_device_and_the_model_computes_the_same(folder: Path) -> None:
    whole, turns = both(folder)
    assert on_device(turns) == []
    seen = watched(turns)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(turns.model(WINDOWS).logits, whole.model(WINDOWS).logits)
    assert {own for own, _ in seen} == set(range(len(turns.blocks)))
    assert all(there == [own] for own, there in seen)


def test_a_walk_brings_every_layer_once_and_all_statistics_are_the_same(folder: Path) -> None:
    whole, turns = both(folder)
    seen = watched(turns)
    used: dict[int, list[torch.Tensor]] = {block.index: [] for block in turns.blocks}
    for block in turns.blocks:
        block.linears["q"].register_forward_hook(lambda m, *_, own=block.index: used[own].append(m.weight))
    expected = Calibration(WINDOWS, 2).grams(whole)
    for grams, others in zip(Calibration(WINDOWS, 2).grams(turns), expected, strict=True):
        for role, gram in grams.items():
            assert torch.equal(gram.xx, others[role].xx)
            assert torch.equal(gram.total, others[role].total)
    assert all(there == [own] for own, there in seen)
    for weights in used.values():  # three batches and one weight
        assert len(weights) == 3
        assert all(weight is weights[0] for weight in weights)
    let_go(turns)
    assert on_device(turns) == []


def test_unchanged_weights_become_again_what_they_rested_as_and_changed_ones_rest_in_its_format(folder: Path) -> None:
    _, view = both(folder)
    before = [dict(block.layer.named_parameters()) for block in view.blocks]
    linears = view.blocks[0].linears
    walk = BlockWalk(view, WINDOWS, 2)
    walk.observe()
    with torch.no_grad():
        linears["down"].weight.mul_(2.0)
    slice_unit(view, 0, torch.tensor([1]))
    walk.advance()
    walk.advance()
    let_go(view)
    # A cut replaces the weights and biases of q, k, v and the weight of o; the bias of o it sets to what it was.
    written = [linears["down"].weight, linears["o"].weight, *(w for r in "qkv" for w in linears[r].parameters())]
    for block, weights in zip(view.blocks, before, strict=True):
        for path, weight in block.layer.named_parameters():
            if weight is not linears["o"].bias:
                assert (weight is weights[path]) != any(weight is other for other in written), path
            assert (weight.dtype, weight.device.type) == (torch.float16, "cpu")
    name = next(path for path, module in view.blocks[0].layer.named_modules() if module is linears["down"])
    assert torch.equal(linears["down"].weight, 2 * before[0][f"{name}.weight"])


def test_what_is_cut_in_turn_is_what_is_cut_at_once(folder: Path, tmp_path: Path) -> None:
    for number, make in enumerate((_cut, _learn)):
        pair = both(folder)
        found = [make(view) for view in pair]
        assert found[0] == found[1]
        for view, name in zip(pair, "ab", strict=True):
            save_model(view.model, None, tmp_path / f"{number}{name}", torch.float16)
        weights = [(tmp_path / f"{number}{name}" / "model.safetensors").read_bytes() for name in "ab"]
        assert weights[0] == weights[1]


def _cut(view: ModelView) -> None:
    allocation = Allocation(view.units, tuple(-(-unit.granules // 2) for unit in view.units))
    cut(view, allocation, WINDOWS, 2, "compensated_elimination", "mean+ridge", 0.01, dense_inputs=False)


def _learn(view: ModelView) -> dict[str, float]:
    def learn(ranks, errors):
        errors[0]({role: order > 3 for role, order in ranks.items()})
        return dict.fromkeys(ranks, 0.5)

    return prune_in_turn(view, WINDOWS, 1, learn)


def test_following_the_stream_in_turn_is_following_it_at_once(tmp_path: Path) -> None:
    save_model(spread(MODELS["llama_tied"]()), None, tmp_path / "m", torch.float16)
    pair = both(tmp_path / "m")
    seen = watched(pair[1])
    for view in pair:
        allocation = Allocation(view.units, tuple(-(-unit.granules // 2) for unit in view.units))
        follow(view, allocation, WINDOWS, 1, "wanda_column", 0.01)
    assert all(there == [own] for own, there in seen)
    for mine, other in zip(pair[0].model.parameters(), pair[1].model.parameters(), strict=True):
        assert torch.equal(mine.half(), other.half())


def test_a_copy_takes_turns_of_its_own(folder: Path) -> None:
    _, view = both(folder)
    with torch.no_grad():
        logits = view.model(WINDOWS).logits
        for duplicate in (copy_model, light_copy):
            other = ModelView(duplicate(view.model))
            assert other.onload is not view.onload
            assert torch.equal(other.model(WINDOWS).logits, logits)
            slice_unit(other, 1, torch.tensor([0, 2]))
            assert not torch.equal(other.model(WINDOWS).logits, logits)
            assert torch.equal(view.model(WINDOWS).logits, logits)


def test_another_number_format_reaches_the_layers_too(folder: Path) -> None:
    whole, turns = both(folder)
    with torch.inference_mode():
        turns.model(WINDOWS)
        for view in (whole, turns):
            view.model.to(dtype=torch.bfloat16)
        assert torch.equal(turns.model(WINDOWS).logits, whole.model(WINDOWS).logits)


def test_a_light_copy_shares_what_is_not_replaced_and_nothing_else(folder: Path) -> None:
    model = load_model(folder)
    other = light_copy(model)
    assert [w.data_ptr() for w in other.parameters()] == [w.data_ptr() for w in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    slice_unit(ModelView(other), 0, torch.tensor([1]))
    other.to(dtype=torch.bfloat16)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_device_map_and_turns_are_refused_together(folder: Path) -> None:
    with pytest.raises(ParameterError, match="Leave out the device map, or set onload"):
        load_model(folder, device_map="auto", onload="block")


@pytest.mark.slow
def test_every_step_of_a_walk_is_on_the_device_of_the_layer(monkeypatch) -> None:
    """Fake tensors compute nothing, but refuse to mix devices; the meta device stands for a real one."""
    for module in (watch, blocks):
        monkeypatch.setattr(module, "check_finite", lambda *_: None)
    monkeypatch.setattr(surgery, "_check_kept", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(FakeTensor, "__bool__", lambda _: False)  # no numbers to look at
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device("meta"):
            view = ModelView(MODELS["llama_tied"]().eval().requires_grad_(False))
        for linear in (module for block in view.blocks for module in block.layer.modules()):
            for name, weight in list(linear.named_parameters(recurse=False)):
                resting = torch.empty(weight.shape, dtype=torch.float16)
                setattr(linear, name, nn.Parameter(resting, requires_grad=False))
        view.onload = Onload(view.model, [block.layer for block in view.blocks])
        windows = mode.from_tensor(WINDOWS)
        dense, pruned = BlockWalk(view, windows, 2), BlockWalk(view, windows, 2)
        for block in view.blocks:
            grams, outputs = dense.observe(("o", "down"))
            assert {gram.xx.device.type for gram in (grams["o"], grams["down"])} == {"meta"}
            assert outputs.device.type == "cpu"
            targets = dense.streams()
            dense.advance(targets["down"])
            for index, role in enumerate(("o", "down")):
                found = pruned.distance(role, targets[role])
                assert {m.cross.device.type for m in (found.fit, found.held)} == {"meta"}
                columns = torch.arange(8, device="meta")
                last = block.linears[role]
                if found.end is not None:
                    assert found.end.replaced(last, columns, last.weight[:, columns]).device.type == "cpu"
                unit = 2 * block.index + index
                slice_unit(view, unit, torch.arange(1 if role == "o" else 8))
            pruned.advance()
        let_go(view)
        assert {w.device.type for block in view.blocks for w in block.layer.parameters()} == {"cpu"}
        assert view.model.device.type == "meta"
