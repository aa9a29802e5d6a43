"""A model seen as prunable units: blocks, roles, heads and channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.gram import Gram
from ffprune.core.units import Kind, Unit
from ffprune.models.experts import ExpertLinear, gather_experts
from ffprune.models.families import Family, family_of
from ffprune.models.fused import take_apart
from ffprune.models.modeling_pruned import tell
from ffprune.models.onload import Onload

Heads = Literal["group", "query"]
"""What a granule of attention is: a key/value group with its query heads, or a query head of every group."""


def granule_indices(granules: Tensor, width: int, runs: int = 1, total: int = 0) -> Tensor:
    """Row or column indices of a linear that belong to some granules.

    Granule g owns the ``width`` consecutive indices from ``g * width``: transformers lays heads out one
    after the other, and the query heads of one key/value group are neighbours (``repeat_kv``). Where a granule is a
    query head of every group, each group is a run that has its part of every granule.

    Args:
        granules: [m] int64, granule indices in any order; or [m, runs], which may differ from run to run.
        width: indices per granule in this linear, in all runs together.
        runs: parts that a granule has, each in a stretch of the linear of its own.
        total: granules that the linear has; needed for several runs.

    Returns:
        [m * width] int64, run by run, in the order of ``granules``.
    """
    part = width // runs
    offsets = torch.arange(part, device=granules.device)
    if runs == 1:
        return (granules.reshape(-1, 1) * part + offsets).flatten()
    places = granules if granules.ndim == 2 else granules[:, None].expand(-1, runs)
    starts = torch.arange(runs, device=granules.device) * total + places  # [m, runs], in parts
    return (starts.T[:, :, None] * part + offsets).flatten()


@dataclass(frozen=True)
class UnitLinears:
    """The linears of one unit.

    Attributes:
        inputs: role -> linear that loses output rows (q, k, v; or gate, up) together with its bias.
        last_role: ``o`` or ``down``.
        last: the linear that loses input columns; its bias is never touched.
        width: role -> rows (for the last role: columns) per granule.
        runs: stretches of every linear that a granule has a part in.
    """

    inputs: dict[str, nn.Linear]
    last_role: str
    last: nn.Linear
    width: dict[str, int]
    runs: int = 1

    @property
    def all(self) -> dict[str, nn.Linear]:
        """Role -> linear, the last one included."""
        return {**self.inputs, self.last_role: self.last}

    @property
    def blocks(self) -> int:
        """Blocks on the diagonal of the Gram of ``last``: one an expert, between which nothing is kept; else 1."""
        return self.last.experts if isinstance(self.last, ExpertLinear) else 1

    @property
    def per_token(self) -> int:
        """Of ``blocks``, those that a token goes through."""
        return self.last.per_token if isinstance(self.last, ExpertLinear) else 1

    @property
    def gram_size(self) -> int:
        """Numbers in the whole Gram of ``last``."""
        return self.last.in_features**2 // self.blocks

    @property
    def granules(self) -> int:
        """Granules the unit has now."""
        return self.last.in_features // self.width[self.last_role]

    def columns(self, granules: Tensor) -> Tensor:
        """Columns of the last linear that belong to some granules (:func:`granule_indices`)."""
        return granule_indices(granules, self.width[self.last_role], self.runs, self.granules)


class Block:
    """One decoder layer: its linears by role, and its shape as it is now.

    Args:
        layer: the decoder layer's module.
        index: its position among the decoder layers.
        family: the row that fits the model.
        granule: what a granule of attention is.

    Attributes:
        layer: the decoder layer's module.
        index: position among the decoder layers.
        attention: the attention module.
        linears: role -> linear; roles are q, k, v, o, up, down and, where the FFN is gated, gate. OPT's
            fc1 is ``up`` and fc2 is ``down``.
        head_dim: width of one head.

    Raises:
        UnsupportedArchitecture: a linear of the row is missing, or query heads do not divide into groups.
    """

    def __init__(self, layer: nn.Module, index: int, family: Family, granule: Heads) -> None:
        self.layer, self.index, self._granule = layer, index, granule
        for fusion in family.fused:
            _submodule(layer, fusion.path, family)
        if family.experts is not None:
            _submodule(layer, family.experts.path, family)
        take_apart(layer, family)
        gather_experts(layer, family)
        self.attention = _submodule(layer, family.attention, family)
        self.linears = {role: _linear(layer, path, family) for role, path in family.paths.items()}
        self.head_dim = int(getattr(self.attention, family.head_dim))
        if self.groups == 0 or self.heads % self.groups:
            raise UnsupportedArchitecture(
                f"Layer {index} has {self.heads} query heads for {self.groups} key/value heads",
                "Every key/value head must serve the same number of query heads, and there must be one",
                "Prune whole key/value groups, or leave this model out",
            )
        self._ffn_inputs = tuple(family.ffn_inputs)
        self._family = family

    @property
    def heads(self) -> int:
        """Query heads now."""
        return self.linears["q"].out_features // self.head_dim

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head now (1 without GQA)."""
        return self.heads // self.groups

    @property
    def groups(self) -> int:
        """Key/value groups now (heads without GQA)."""
        return self.linears["k"].out_features // self.head_dim

    @property
    def channels(self) -> int:
        """FFN channels now; in every expert, where there are several."""
        return self.unit_linears("ffn").granules

    def unit_linears(self, kind: Kind, granule: Heads | None = None) -> UnitLinears:
        """The linears of this layer's attention or FFN unit, for granules as the block has them or as named."""
        if kind == "attention" and (granule or self._granule) == "query":
            query = self.head_dim * self.groups
            return UnitLinears(
                {"q": self.linears["q"]}, "o", self.linears["o"], {"q": query, "o": query}, runs=self.groups
            )
        if kind == "attention":
            query = self.head_dim * self.heads_per_group
            return UnitLinears(
                {role: self.linears[role] for role in "qkv"},
                "o",
                self.linears["o"],
                {"q": query, "k": self.head_dim, "v": self.head_dim, "o": query},
            )
        inputs = {role: self.linears[role] for role in self._ffn_inputs}
        # A channel of every expert.
        last = self.linears["down"]
        experts = last.experts if isinstance(last, ExpertLinear) else 1
        return UnitLinears(inputs, "down", last, dict.fromkeys((*inputs, "down"), experts), runs=experts)

    @property
    def router_params(self) -> int:
        """Weights of the router, a matrix product of its own; 0 without experts."""
        experts = self._family.experts
        return 0 if experts is None else sum(p.numel() for p in self.layer.get_submodule(experts.router).parameters())

    def unreached(self, down: Gram) -> list[str]:
        """Names of the experts that no token came to, by the Gram of their channels; none in a family without any."""
        if self._family.experts is None:
            return []
        blocks = down.diag.chunk(self.unit_linears("ffn").blocks)
        return [f"layers.{self.index}.experts.{i}" for i, block in enumerate(blocks) if not block.any()]

    def sync_heads(self) -> None:
        """Tell the attention module the head counts that its projections have now."""
        tell(self.attention, self._family.layout, self.heads, self.groups)


class ModelView:
    """A causal language model of a supported family, seen as prunable units (METHODS 1).

    The view holds the model's own modules: surgery on the model shows in ``blocks`` and ``prunable`` at
    once, while ``units`` keeps the granule counts found when the view was made, so that an allocation
    made for them stays valid. Already pruned models with different shapes per layer are fine.

    Args:
        model: the model; what it computes is not changed, but fused linears (Phi-3, GPT-NeoX, GPT-2) are replaced by
            their parts (:mod:`ffprune.models.fused`), and experts by one wide FFN (:mod:`ffprune.models.experts`).
        heads: what a granule of attention is. A query head of every key/value group leaves keys, values and their cache
            as they are, and every group as many query heads as the others.

    Attributes:
        model: the model.
        heads: what a granule of attention is.
        family: its row in the table of families.
        blocks: one per decoder layer.
        units: layer by layer, attention (``layers.3.attention``) before FFN (``layers.3.ffn``).
        prunable: ``layers.3.q`` -> linear, for q, k, v, o, gate, up, down of every layer in this order
            (OPT: no gate; fc1 is ``up``, fc2 is ``down``).
        onload: brings layers to the device in turn, for a model that was loaded so; else None.

    Raises:
        UnsupportedArchitecture: no family fits.
        ParameterError: query heads are to go from a model where each has a key/value head of its own.
    """

    def __init__(self, model: PreTrainedModel, heads: Heads = "group") -> None:
        self.model, self.heads = model, heads
        self.family = family_of(model.config)
        self.onload: Onload | None = getattr(model, "onload", None)
        layers = _submodule(model, self.family.layers, self.family)
        self.blocks = [Block(layer, i, self.family, heads) for i, layer in enumerate(layers.children())]
        if heads == "query" and all(block.heads_per_group == 1 for block in self.blocks):
            raise ParameterError(
                f"Query heads inside key/value groups were to be pruned from a {type(model).__name__}",
                "Each of its query heads has a key/value head of its own",
                "Set units.heads to group: a group is one head there",
            )
        kinds: tuple[Kind, ...] = ("attention", "ffn")
        self._kinds = [(block, kind) for block in self.blocks for kind in kinds]
        self.units = tuple(_unit(block, kind) for block, kind in self._kinds)
        self.prunable = {
            f"layers.{block.index}.{role}": linear for block in self.blocks for role, linear in block.linears.items()
        }

    @property
    def weight_units(self) -> tuple[Unit, ...]:
        """The units of unstructured pruning (METHODS 1): weight matrices, whose granules are single weights."""
        return tuple(
            Unit(name, "weight", int(name.split(".")[1]), linear.weight.numel(), 1)
            for name, linear in self.prunable.items()
        )

    @property
    def prunable_params(self) -> int:
        """Prunable weights when the view was made: the denominator of sparsity."""
        return sum(unit.params for unit in self.units)

    def granule_macs(self, context: int) -> list[int]:
        """Multiply-adds of a granule of every unit for one token that attends to ``context`` tokens, itself included.

        Its weights, and for attention the products of its query heads with ``context`` keys (scores) and as
        many values (their weighted sum): 2 * head_dim * heads * context. A prefill of n tokens, each of which attends
        to those before it, comes to ``context`` = (n + 1) / 2 on average. Of experts, those count that a token visits.
        """
        heads = (block.groups if self.heads == "query" else block.heads_per_group for block, _ in self._kinds)
        products = [2 * block.head_dim * count * context for (block, _), count in zip(self._kinds, heads, strict=True)]
        parts = [self.unit_linears(index) for index in range(len(self.units))]
        return [
            unit.params_per_granule * part.per_token // part.blocks + (product if unit.kind == "attention" else 0)
            for unit, part, product in zip(self.units, parts, products, strict=True)
        ]

    @property
    def last_maps(self) -> list[nn.Linear]:
        """The linear map that ends every unit, in the order of ``units``."""
        return [self.unit_linears(index).last for index in range(len(self.units))]

    def block_of(self, unit_index: int) -> Block:
        """The block that a unit belongs to."""
        return self._kinds[unit_index][0]

    def unit_linears(self, unit_index: int) -> UnitLinears:
        """The linears of a unit, by its index in ``units``."""
        block, kind = self._kinds[unit_index]
        return block.unit_linears(kind)


def _unit(block: Block, kind: Kind) -> Unit:
    parts = block.unit_linears(kind)
    per_granule = parts.width[parts.last_role] * parts.last.out_features
    per_granule += sum(parts.width[role] * linear.in_features for role, linear in parts.inputs.items())
    # With whole key/value groups as granules, every weight goes with one.
    whole = sum(linear.weight.numel() for linear in block.unit_linears(kind, "group").all.values())
    fixed = whole - parts.granules * per_granule
    return Unit(f"layers.{block.index}.{kind}", kind, block.index, parts.granules, per_granule, fixed=fixed)


def _submodule(module: nn.Module, path: str, family: Family) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedArchitecture(
            f"A {type(module).__name__} has no {path!r}, which the row for {family.model_type!r} names",
            "ffprune prunes causal language models as transformers builds them",
            "Load the model with ffprune.load_model or AutoModelForCausalLM",
        ) from error


def _linear(layer: nn.Module, path: str, family: Family) -> nn.Linear:
    module = _submodule(layer, path, family)
    if not isinstance(module, nn.Linear):
        raise UnsupportedArchitecture(
            f"{path!r} of a {type(layer).__name__} is a {type(module).__name__}",
            "Only torch.nn.Linear projections can be pruned",
            "Load the model without quantisation or adapters",
        )
    return module
