"""Every unit's last linear map, repaired, at any number of granules kept: banked, remembered, or made on demand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ffprune.core.gram import block_dampings
from ffprune.core.ridge import PrefixRidge
from ffprune.core.units import Unit
from ffprune.models.view import ModelView, granule_indices

FACTOR_BYTES = 1 << 30
"""Of factorisations that are kept for units with levels in a bank, of which few must be made. Units without any are
asked by every policy: theirs are all kept, since to factorise takes longer than to solve."""

Bank = Sequence[Mapping[int, Tensor]]
"""Per unit, granules kept -> repaired last map ``[d_out, k]`` in the order of importance; not every number need be
there. Mapped from files, it costs no memory that the system could not take back."""


class Levels:
    """The repaired last map of every unit at every level of one fixed order of granules (METHODS 7).

    A level is looked up in the bank, then among those made, or brought to a device, before; else it is made. One
    between two multiples of ``step`` is made from the lower one, even where a bank of finer steps has it: a bank
    changes no map. A unit is factorised when the first of its levels must be made, so that a bank which has them all
    costs no factorisation.

    Args:
        view: the dense model, in full precision; its last maps are kept.
        orders: per unit, int64 ``[granules]`` (or ``[granules, runs]``), most important first.
        grams: per unit, float ``[n, n]``, X^T X of the last map's input, or the blocks on its diagonal, one a run; read
            when the unit is factorised.
        damping: lambda relative to mean diag of the Gram.
        bank: levels made earlier, with the same arguments; None for none.
        step: FFN channels that most policies go by (``search.step``); 1: every level is solved for by itself.
        cache_bytes: how much of the maps made or moved here to keep; the least recently used go first.
    """

    def __init__(
        self,
        view: ModelView,
        orders: Sequence[Tensor],
        grams: Sequence[Tensor],
        damping: float,
        bank: Bank | None = None,
        step: int = 1,
        cache_bytes: int = 1 << 30,
    ) -> None:
        parts = [view.unit_linears(index) for index in range(len(view.units))]
        # Copies on the CPU: the model goes on to another dtype and to other shapes.
        self._weights = [_compact(part.last.weight.detach()).to("cpu", copy=True) for part in parts]
        self._widths = [part.width[part.last_role] for part in parts]
        self._runs = [part.runs for part in parts]
        self._steps = [step if unit.kind == "ffn" else 1 for unit in view.units]
        self._orders, self._grams, self._damping, self._bank = orders, grams, damping, bank
        self._factors: OrderedDict[int, list[PrefixRidge]] = OrderedDict()
        self._made: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._room = cache_bytes

    def at(self, index: int, kept: int, like: Tensor) -> Tensor:
        """The map of one unit at one level.

        Args:
            index: of the unit.
            kept: granules that stay, fewer than all.
            like: a tensor of the dtype and device wanted.

        Returns:
            ``[d_out, kept * width]``; not to be written to.
        """
        between = self._below(index, kept) != kept
        banked = None if self._bank is None or between else self._bank[index].get(kept)
        if banked is not None and (banked.device, banked.dtype) == (like.device, like.dtype):
            return banked
        key = index, kept
        if key not in self._made:
            found = self._new(index, kept, like) if banked is None else banked
            self._made[key] = found.to(like.device, like.dtype)
            self._room -= self._made[key].nbytes
            while self._room < 0 and len(self._made) > 1:
                self._room += self._made.popitem(last=False)[1].nbytes
        self._made.move_to_end(key)
        return self._made[key]

    def _new(self, index: int, kept: int, like: Tensor) -> Tensor:
        """A level that the bank lacks, float32 on the CPU."""
        below = self._below(index, kept)
        if below == kept:
            return self.make(index, kept)
        (factor,) = self._factors_of(index)
        return factor.extend(self.at(index, below, like).cpu(), kept * self._widths[index])

    def _below(self, index: int, kept: int) -> int:
        """The level that this one is made from: itself, or the multiple of the step below it."""
        step = self._steps[index]
        below = kept // step * step
        return kept if below == 0 or self._runs[index] > 1 else below

    def make(self, index: int, kept: int) -> Tensor:
        """Solve for one level, float32 ``[d_out, kept * width]`` on the CPU."""
        factors, runs = self._factors_of(index), self._runs[index]
        columns = kept * self._widths[index] // len(factors)
        found = torch.cat([factor.at(columns) for factor in factors], 1)
        if len(factors) == runs:
            return found
        by_granule = found.view(len(found), kept, runs, -1)
        return by_granule.transpose(1, 2).flatten(1)  # run by run, as the model has them

    def _factors_of(self, index: int) -> list[PrefixRidge]:
        if index not in self._factors:
            self._factors[index] = self._factorise(index)
            self._forget_factors(index)
        self._factors.move_to_end(index)
        return self._factors[index]

    def _forget_factors(self, latest: int) -> None:
        """The least recently used first, where a bank leaves them little to do."""
        banked = [i for i in self._factors if self._bank is not None and self._bank[i] and i != latest]
        held = {i: sum(factor.nbytes for factor in self._factors[i]) for i in (*banked, latest)}
        for index in banked:
            if sum(held.values()) <= FACTOR_BYTES:
                break
            del self._factors[index], held[index]

    def _factorise(self, index: int) -> list[PrefixRidge]:
        """One factor; or one a run, where the Gram has a block for each."""
        weight, gram, order, width = self._weights[index], self._grams[index], self._orders[index], self._widths[index]
        if gram.ndim == 2:
            return [PrefixRidge.prepare(weight, gram, _by_granule(order, width, self._runs[index]), self._damping)]
        factors = []
        parts = zip(weight.chunk(len(gram), 1), gram, order.T, block_dampings(gram, self._damping), strict=True)
        for part, block, own, damping in parts:
            # Where no token came, channels are taken for independent: nothing is made up for.
            known = torch.eye(len(block)) if damping is None else block
            columns = granule_indices(own, width // len(gram))
            factors.append(PrefixRidge.prepare(part, known, columns, damping or 0.0))
        return factors

    def fill(self, levels: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[dict[int, Tensor]]:
        """Make a bank, unit after unit; the factors of a unit are dropped behind it.

        Args:
            levels: per unit, the numbers of granules kept.
            dtype: of the maps.
        """
        for index, wanted in enumerate(levels):
            yield {kept: self.make(index, kept).to(dtype) for kept in wanted}
            self._factors.pop(index, None)


def _compact(weight: Tensor) -> Tensor:
    """The same numbers in the narrowest format that holds them: those of a checkpoint in half precision, in half."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return weight


def _by_granule(order: Tensor, width: int, runs: int) -> Tensor:
    """Columns of a last map, granule by granule, so that any number of granules is a prefix; int64 ``[n]``."""
    whole = granule_indices(order, width, runs, len(order))  # run by run
    return whole.view(runs, len(order), -1).transpose(0, 1).flatten()


def levels_within(view: ModelView, low: float, step: int, itemsize: int, room: float) -> tuple[list[list[int]], int]:
    """Which levels a bank has room for: multiples of a step that is doubled until they fit.

    Args:
        view: the dense model.
        low: least retention.
        step: FFN channels between two levels; attention has a level for every granule.
        itemsize: bytes of a weight.
        room: bytes, at most.

    Returns:
        Per unit the numbers of granules kept, rising; and the step, 0 when nothing fits.
    """
    largest = max(unit.granules for unit in view.units)
    while step <= largest:
        levels = [_multiples(unit, low, step) for unit in view.units]
        if bank_bytes(view, levels, itemsize) <= room:
            return levels, step
        step *= 2
    return [[] for _ in view.units], 0


def coarsest(view: ModelView, low: float, step: int, itemsize: int) -> int:
    """Bytes of the smallest bank that :func:`levels_within` would make."""
    largest = max(unit.granules for unit in view.units)
    while 2 * step <= largest:
        step *= 2
    return bank_bytes(view, [_multiples(unit, low, step) for unit in view.units], itemsize)


def bank_bytes(view: ModelView, levels: Sequence[Sequence[int]], itemsize: int) -> int:
    """What a bank of these levels, per unit, takes."""
    parts = [view.unit_linears(index) for index in range(len(view.units))]
    return itemsize * sum(
        part.last.out_features * part.width[part.last_role] * sum(kept)
        for part, kept in zip(parts, levels, strict=True)
    )


def _multiples(unit: Unit, low: float, step: int) -> list[int]:
    step = step if unit.kind == "ffn" else 1
    first = -(-max(1.0, low * unit.granules) // step)
    return list(range(int(first) * step, unit.granules, step))
