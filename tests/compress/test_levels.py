from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffprune.compress import levels as levels_module
from ffprune.compress.levels import Bank, Levels, levels_within
from ffprune.core.ridge import repair
from ffprune.models.view import ModelView, granule_indices
from tests.oracles.calibration import collect
from tests.tiny import VOCAB, llama, spread

DAMPING = 0.01
LIKE = torch.zeros(0)


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView(spread(llama()).requires_grad_(False))


@pytest.fixture(scope="module")
def orders(view: ModelView) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randperm(unit.granules, generator=draw) for unit in view.units]


@pytest.fixture(scope="module")
def grams(view: ModelView) -> list[Tensor]:
    names = [f"layers.{view.block_of(i).index}.{view.unit_linears(i).last_role}" for i in range(len(view.units))]
    tokens = torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(1))
    found = collect(view, tokens, names, 2)
    return [xx for name in names if (xx := found[name].xx) is not None]


def test_every_level_is_the_ridge_repair_of_its_cut(view: ModelView, orders: list[Tensor], grams: list[Tensor]) -> None:
    levels = Levels(view, orders, grams, DAMPING)
    for index, unit in enumerate(view.units):
        parts = view.unit_linears(index)
        for kept in range(1, unit.granules):
            columns = granule_indices(orders[index][:kept], parts.width[parts.last_role])
            expected = repair(parts.last.weight, grams[index], columns, DAMPING)
            torch.testing.assert_close(levels.at(index, kept, LIKE), expected, rtol=1e-3, atol=1e-4)


def test_a_bank_gives_the_very_maps_that_are_made_without_it_and_reads_no_gram(
    view: ModelView, orders: list[Tensor], grams: list[Tensor]
) -> None:
    wanted, step = levels_within(view, 0.2, 2, 2, 1e9)
    assert step == 2
    bank = list(Levels(view, orders, grams, DAMPING).fill(wanted, torch.bfloat16))
    assert [sorted(maps) for maps in bank] == wanted
    # There is no Gram to read.
    banked, made = Levels(view, orders, [], DAMPING, bank), Levels(view, orders, grams, DAMPING)
    for index, levels in enumerate(wanted):
        for kept in levels:
            found = banked.at(index, kept, LIKE.bfloat16())
            assert found.data_ptr() == bank[index][kept].data_ptr()  # no copy
            assert torch.equal(found, made.at(index, kept, LIKE.bfloat16()))


def test_what_a_bank_lacks_is_made(view: ModelView, orders: list[Tensor], grams: list[Tensor]) -> None:
    bank = list(Levels(view, orders, grams, DAMPING).fill([[2] for _ in view.units], torch.float32))
    half = Levels(view, orders, grams, DAMPING, bank)
    full = Levels(view, orders, grams, DAMPING)
    for index in range(len(view.units)):
        assert torch.equal(half.at(index, 1, LIKE), full.at(index, 1, LIKE))


def test_few_factorisations_are_kept_of_units_that_have_a_bank(
    view: ModelView, orders: list[Tensor], grams: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels_module, "FACTOR_BYTES", 1)
    bank = list(Levels(view, orders, grams, DAMPING).fill([[2] for _ in view.units], torch.float32))
    banked, alone = Levels(view, orders, grams, DAMPING, bank), Levels(view, orders, grams, DAMPING)
    for index in [*range(len(view.units)), 0]:
        assert torch.equal(banked.make(index, 1), alone.make(index, 1))
        assert list(banked._factors) == [index]
    assert len(alone._factors) == len(view.units)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_half_precision_wait_in_half(dtype: torch.dtype, grams: list[Tensor], orders: list[Tensor]) -> None:
    model = spread(llama()).requires_grad_(False).to(dtype).float()
    lasts = [last.weight for last in ModelView(model).last_maps]
    levels = Levels(ModelView(model), orders, grams, DAMPING)
    assert {weight.itemsize for weight in levels._weights} == {dtype.itemsize}
    assert all(torch.equal(kept.float(), last) for kept, last in zip(levels._weights, lasts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_between_two_steps_is_made_from_the_lower_one_and_a_bank_changes_no_map(
    view: ModelView, orders: list[Tensor], grams: list[Tensor], dtype: torch.dtype
) -> None:
    def levels(bank: Bank | None, step: int) -> Levels:
        return Levels(view, orders, grams, DAMPING, bank, step)

    like = LIKE.to(dtype)
    bank = list(levels(None, 1).fill([[3, 6] for _ in view.units], dtype))
    some = list(levels(None, 1).fill([[6] for _ in view.units], dtype))
    # Its steps do not divide those of the policies.
    finer = list(levels(None, 1).fill([range(2, unit.granules, 2) for unit in view.units], dtype))
    found = [levels(given, 3) for given in (bank, some, finer, None)]
    for index, unit in enumerate(view.units):
        for kept in range(1, unit.granules):
            first, *others = (one.at(index, kept, like) for one in found)
            assert all(torch.equal(first, other) for other in others)
            expected = levels(None, 1).at(index, kept, LIKE)
            scale = float(expected.abs().max())
            torch.testing.assert_close(first.float(), expected, rtol=0, atol=(1e-5 + torch.finfo(dtype).eps) * scale)


def test_made_maps_are_reused_within_their_room(view: ModelView, orders: list[Tensor], grams: list[Tensor]) -> None:
    small, free = (Levels(view, orders, grams, DAMPING, cache_bytes=room) for room in (500, 1 << 30))
    first = free.at(1, 3, LIKE)
    for kept in (1, 2, 3, 4, 5, 3, 1):
        assert torch.equal(small.at(1, kept, LIKE), free.at(1, kept, LIKE))
        assert sum(map.nbytes for map in small._made.values()) <= 500 or len(small._made) == 1
    assert free.at(1, 3, LIKE) is first
    assert len(small._made) < len(free._made) == 5


def test_the_step_doubles_until_the_bank_fits(view: ModelView) -> None:
    def size(levels: list[list[int]]) -> int:
        total = 0
        for index, kept in enumerate(levels):
            parts = view.unit_linears(index)
            total += sum(kept) * parts.width[parts.last_role] * parts.last.out_features * 2
        return total

    whole, step = levels_within(view, 0.2, 1, 2, 1e9)
    assert step == 1
    for unit, levels in zip(view.units, whole, strict=True):
        assert levels == [k for k in range(1, unit.granules) if k >= 0.2 * unit.granules]
    room = size(whole) - 1
    fewer, step = levels_within(view, 0.2, 1, 2, room)
    assert step == 2
    assert size(fewer) <= room
    assert all(k % 2 == 0 for unit, levels in zip(view.units, fewer, strict=True) for k in levels if unit.kind == "ffn")
    assert levels_within(view, 0.2, 1, 2, 0) == ([[] for _ in view.units], 0)
