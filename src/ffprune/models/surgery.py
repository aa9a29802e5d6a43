"""Surgery: put smaller weights into a model's units, or zero what a cut would remove."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError
from ffprune.models.layer_config import write_layer_config
from ffprune.models.linear import set_linear
from ffprune.models.view import ModelView, granule_indices


@dataclass(frozen=True)
class UnitWeights:
    """The weights of one unit with whole granules, detached from any module.

    Attributes:
        weight: role -> [out, in] tensor.
        bias: role -> [out] tensor, for the linears that have one.
        last_role: ``o`` or ``down``: the linear whose granules are columns and whose bias no cut touches.
        width: role -> rows (for the last role: columns) per granule.
        runs: stretches of every linear that a granule has a part in.
    """

    weight: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]
    last_role: str
    width: Mapping[str, int]
    runs: int = 1

    @property
    def granules(self) -> int:
        """Number of granules."""
        return self.weight[self.last_role].shape[1] // self.width[self.last_role]

    def select(self, kept: Tensor) -> UnitWeights:
        """The granules ``kept`` ([m] int64; or [m, runs]) in that order, as contiguous copies."""
        _check_kept(kept, self.granules)
        kept = kept.to(self.weight[self.last_role].device)
        index = {role: granule_indices(kept, width, self.runs, self.granules) for role, width in self.width.items()}
        last = self.last_role
        weight = {role: w.index_select(int(role == last), index[role]) for role, w in self.weight.items()}
        bias = {role: b if role == last else b[index[role]] for role, b in self.bias.items()}
        return UnitWeights(weight, bias, last, self.width, self.runs)

    def prefix(self, kept: int) -> UnitWeights:
        """The first ``kept`` granules, where they lie in one run as views that share this object's storage.

        With granules ordered by importance once (:meth:`select`), every retention is such a prefix, and a
        search trial copies nothing but query heads and experts, whose parts lie apart.
        """
        if not 0 <= kept <= self.granules:
            raise ParameterError(
                f"Asked for the first {kept} granules",
                f"There are {self.granules}",
                f"Ask for 0 to {self.granules}",
            )
        if self.runs > 1:
            return self.select(torch.arange(kept))
        last = self.last_role
        sizes = {role: kept * width for role, width in self.width.items()}
        weight = {role: w[:, : sizes[role]] if role == last else w[: sizes[role]] for role, w in self.weight.items()}
        bias = {role: b if role == last else b[: sizes[role]] for role, b in self.bias.items()}
        return UnitWeights(weight, bias, last, self.width)

    def replace_last(self, weight: Tensor) -> UnitWeights:
        """The same unit with another last linear [out, in], as ridge repair returns it (METHODS 7)."""
        return UnitWeights({**self.weight, self.last_role: weight}, self.bias, self.last_role, self.width, self.runs)


def read_unit(view: ModelView, unit_index: int) -> UnitWeights:
    """The weights that a unit has now, sharing the model's storage.

    Later surgery on the model swaps parameters and does not reach these tensors; :func:`mask_unit` and
    other in-place writes do.
    """
    parts = view.unit_linears(unit_index)
    linears = parts.all
    return UnitWeights(
        {role: linear.weight.detach() for role, linear in linears.items()},
        {role: linear.bias.detach() for role, linear in linears.items() if linear.bias is not None},
        parts.last_role,
        parts.width,
        parts.runs,
    )


def set_unit(view: ModelView, unit_index: int, weights: UnitWeights) -> None:
    """Make a unit compute with other weights; cheap enough for hundreds of search trials.

    Tensors are taken as they are: no copy, views allowed. Feature counts and the attention's head counts
    follow the tensors. Parameters come out with ``requires_grad`` False. The model's config is left alone
    (:func:`ffprune.models.layer_config.write_layer_config` brings it up to date).

    Args:
        view: the model's view.
        unit_index: index in ``view.units``.
        weights: as :func:`read_unit` gives them, with any number of granules.

    Raises:
        ParameterError: a unit without any granule that transformers cannot run: attention, and GPT-2's FFN.
    """
    if weights.granules == 0 and (weights.last_role == "o" or view.family.needs_channels):
        what, granule = ("Attention", "group") if weights.last_role == "o" else ("This family's FFN", "channel")
        raise ParameterError(
            f"Asked to remove every {granule} of {view.units[unit_index].name}",
            f"{what} needs at least one {granule} per layer to run in transformers",
            f"Keep at least one {granule}, by a higher lower bound for retention",
        )
    for role, linear in view.unit_linears(unit_index).all.items():
        set_linear(linear, weights.weight[role], weights.bias.get(role))
    if weights.last_role == "o":
        view.block_of(unit_index).sync_heads()


def slice_unit(view: ModelView, unit_index: int, kept: Tensor) -> None:
    """Physically keep some granules of a unit, in place.

    Args:
        view: the model's view.
        unit_index: index in ``view.units``.
        kept: [m] int64 (or [m, runs]), indices among the granules that the unit has now, in the wanted order.

    Raises:
        ParameterError: indices out of range or repeated, or an attention unit without any granule.
    """
    set_unit(view, unit_index, read_unit(view, unit_index).select(kept))


def slice_model(view: ModelView, kept: Sequence[Tensor]) -> None:
    """Slice every unit in place, :func:`slice_unit` with ``kept[i]`` for unit i; the model's config follows.

    Raises:
        ParameterError: not one index tensor per unit, or one that :func:`slice_unit` refuses.
    """
    if len(kept) != len(view.units):
        raise ParameterError(
            f"Got {len(kept)} lists of granules",
            f"The model has {len(view.units)} units",
            "Give one list per unit, layer by layer, attention before FFN",
        )
    for unit_index, granules in enumerate(kept):
        slice_unit(view, unit_index, granules)
    write_layer_config(view.model.config, view)


def mask_unit(view: ModelView, unit_index: int, kept: Tensor) -> None:
    """Zero the granules of a unit that are not in ``kept``, in place: the slow twin of :func:`slice_unit`.

    A removed granule loses its rows with their biases and its columns of the last linear; the last
    linear's own bias stays. The masked model computes what the sliced one does.

    Args:
        view: the model's view.
        unit_index: index in ``view.units``.
        kept: [m] int64 (or [m, runs]), indices among the granules that the unit has now.

    Raises:
        ParameterError: indices out of range or repeated.
    """
    parts = view.unit_linears(unit_index)
    _check_kept(kept, parts.granules)

    def gone(role: str, size: int) -> Tensor:
        removed = torch.ones(size, dtype=torch.bool, device=kept.device)
        removed[granule_indices(kept, parts.width[role], parts.runs, parts.granules)] = False
        return removed

    with torch.no_grad():
        for role, linear in parts.inputs.items():
            rows = gone(role, linear.out_features)
            linear.weight[rows] = 0
            if linear.bias is not None:
                linear.bias[rows] = 0
        parts.last.weight[:, gone(parts.last_role, parts.last.in_features)] = 0


def param_count(module: nn.Module) -> int:
    """Parameters that a module has, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy for trials: own tensors, own config, tied weights still tied."""
    return copy.deepcopy(model)


def light_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config and modules of its own, whose weights are the original's until they are replaced.

    Surgery and conversions replace weights; what writes into them reaches both models.
    """
    shared = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, shared)


def _check_kept(kept: Tensor, granules: int) -> None:
    inside = kept.numel() == 0 or (int(kept.min()) >= 0 and int(kept.max()) < granules)
    runs = kept.unbind(1) if kept.ndim == 2 else [kept]
    if not inside or any(torch.unique(run).numel() != run.numel() for run in runs):
        raise ParameterError(
            f"Asked to keep granules {kept.tolist()[:8]}...",
            f"The unit has granules 0 to {granules - 1}, each of which can be kept once",
            "Give different indices in that range",
        )
