"""A mixture of experts as one wide FFN: a linear per role for all experts, of whose channels the router picks some.

With the channels of all experts side by side, an expert after the other, and the router's weight of an expert as a
factor of its channels (0 where it was not chosen), a mixture is a gated FFN like any other. So it has a ``gate``, an
``up`` and a ``down``, whose weights are those of all experts in one matrix; only what the router picked is computed.
Files keep a family's own names and layout.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffprune.core.gram import Gram
from ffprune.models.families import Experts, Family
from ffprune.models.linear import set_linear


class Routing(NamedTuple):
    """Which tokens go through which experts. A row is a token at one of its experts; rows are sorted by expert.

    Attributes:
        tokens: [rows] int64, the token of every row.
        sizes: rows of every expert.
        total: tokens.
    """

    tokens: Tensor
    sizes: list[int]
    total: int


class ExpertLinear(nn.Linear):
    """One role of all experts.

    Args:
        weight: of the experts after one another, along the dimension of their channels.
        experts: how many there are.
        per_token: how many of them a token goes through.
    """

    channels_in: int
    """Dimension of the weight that the experts' channels lie along."""

    def __init__(self, weight: Tensor, experts: int, per_token: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        set_linear(self, weight, None)
        self.experts, self.per_token = experts, per_token

    @property
    def macs(self) -> int:
        """Multiply-adds for one token."""
        return self.weight.numel() * self.per_token // self.experts

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Every expert's own weight, ``[out, in]``, as views."""
        return torch.chunk(self.weight, self.experts, self.channels_in)

    def _each(self, rows: Tensor, sizes: list[int]) -> Tensor:
        pieces = torch.split(rows, sizes)
        return torch.cat([linear(piece, weight) for piece, weight in zip(pieces, self.parts, strict=True)])


class ExpertInput(ExpertLinear):
    """``gate`` or ``up`` of all experts, weight ``[experts * width, hidden]``."""

    channels_in = 0

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # type: ignore[override]  # an expert needs its tokens told
        """``[tokens, hidden]`` to ``[rows, width]``."""
        return self._each(x[routing.tokens], routing.sizes)


class ExpertOutput(ExpertLinear):
    """``down`` of all experts, weight ``[hidden, experts * width]``; a bias is added to every token once."""

    channels_in = 1

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:  # type: ignore[override]  # as ExpertInput
        """``[rows, width]``, weighted by the router, to ``[tokens, hidden]``: the sum over a token's experts."""
        outputs = self._each(rows, routing.sizes)
        summed = outputs.new_zeros(routing.total, self.out_features).index_add(0, routing.tokens, outputs)
        return summed if self.bias is None else summed + self.bias


def add_inputs(gram: Gram, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Add what enters a linear to its Gram, in place; every expert's rows to a block of their own."""
    if isinstance(module, ExpertOutput):
        rows, routing = inputs
        gram.update_blocks(torch.split(rows, routing.sizes), routing.total)
    else:
        gram.update(inputs[0])


class Mixture(nn.Module):
    """What a family's experts compute, by a linear per role; takes the place of its module.

    Args:
        stock: the family's module, ``gate_up_proj`` ``[experts, 2 * width, hidden]`` and ``down_proj``
            ``[experts, hidden, width]``; its weights are copied.
        per_token: experts of a token.
    """

    def __init__(self, stock: Any, per_token: int) -> None:
        super().__init__()
        gate_up, down = stock.gate_up_proj.detach(), stock.down_proj.detach()
        experts, grad = len(down), stock.down_proj.requires_grad
        gate, up = (half.flatten(0, 1) for half in gate_up.chunk(2, 1))
        self.gate, self.up = ExpertInput(gate, experts, per_token), ExpertInput(up, experts, per_token)
        self.down = ExpertOutput(down.transpose(0, 1).flatten(1), experts, per_token)
        self.act_fn = stock.act_fn
        # In a tuple, so that it is no child: it lends its class and settings to files.
        del stock.gate_up_proj, stock.down_proj
        self._stock = (stock,)
        self.requires_grad_(grad)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As the family's module.

        Args:
            hidden: [tokens, hidden].
            experts: [tokens, k] int64, the experts of every token.
            weights: [tokens, k], the router's weights of these.
        """
        chosen = experts.flatten()
        order = torch.argsort(chosen, stable=True)
        sizes = torch.bincount(chosen, minlength=self.down.experts).tolist()
        routing = Routing(order // experts.shape[1], sizes, len(hidden))
        rows = self.act_fn(self.gate(hidden, routing)) * self.up(hidden, routing)
        # Before the last map, which is linear: its Gram then weighs tokens as the layer's output does.
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        output: Tensor = self.down(rows, routing)
        return output.to(hidden.dtype)

    def fused(self) -> nn.Module:
        """The family's own module with the present weights."""
        stock = copy.deepcopy(self._stock[0])
        inputs = [torch.cat(pair) for pair in zip(self.gate.parts, self.up.parts, strict=True)]
        stock.gate_up_proj = nn.Parameter(torch.stack(inputs).detach())
        stock.down_proj = nn.Parameter(torch.stack(self.down.parts).detach())
        stock.intermediate_dim = stock.down_proj.shape[2]
        fused: nn.Module = stock.requires_grad_(self.down.weight.requires_grad)
        return fused


def gather_experts(layer: nn.Module, family: Family) -> None:
    """Put a :class:`Mixture` in the place of a decoder layer's experts, in place; once is enough.

    Raises:
        AttributeError: the layer has no such module.
    """
    if family.experts is None or isinstance(layer.get_submodule(family.experts.path), Mixture):
        return
    router: Any = layer.get_submodule(family.experts.router)
    layer.set_submodule(family.experts.path, Mixture(layer.get_submodule(family.experts.path), int(router.top_k)))


class Place(NamedTuple):
    """Where a tensor of a file is in a model.

    Attributes:
        name: of the model's tensor.
        expert: whose part of it; None for all of it.
    """

    name: str
    expert: int | None = None


def place_of(key: str, experts: Experts) -> Place:
    """Where a tensor of a file of a family with experts goes."""
    outer = experts.path.rpartition(".")[0]
    key = re.sub(rf"(\.\d+\.){re.escape(experts.stored)}\.", rf"\g<1>{outer}.", key)
    roles = {name: role for role, name in experts.linears.items()}
    found = re.fullmatch(rf"(.*\.{re.escape(experts.path)})\.(\d+)\.({'|'.join(roles)})\.weight", key)
    return Place(key) if found is None else Place(f"{found[1]}.{roles[found[3]]}.weight", int(found[2]))


def stored_parts(name: str, tensor: Tensor, owner: nn.Module, experts: Experts) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of a model is in its family's files: an expert's part each, or the tensor itself; views.

    Args:
        name: in the model's state dict.
        tensor: itself.
        owner: the module that has it.
        experts: of the family.
    """
    if not isinstance(owner, ExpertLinear):
        yield key_of(Place(name), experts), tensor
        return
    for expert, part in enumerate(owner.parts):
        yield key_of(Place(name, expert), experts), part


def key_of(place: Place, experts: Experts) -> str:
    """The name of a tensor in a family's files: the inverse of :func:`place_of`."""
    outer = experts.path.rpartition(".")[0]
    name = place.name
    if place.expert is not None:
        head, role, kind = name.rsplit(".", 2)
        name = f"{head}.{place.expert}.{experts.linears[role]}.{kind}"
    return re.sub(rf"(\.\d+\.){re.escape(outer)}\.", rf"\g<1>{experts.stored}.", name)
