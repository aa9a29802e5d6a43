"""Unstructured and semi-structured pruning: single weights go, matrix by matrix, block after block."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffprune.core.gptq import quantise
from ffprune.core.gram import Gram
from ffprune.core.masks import Scope, keep_mask, mask_from_ranks, pattern_mask, ranks
from ffprune.core.saliency import SALIENCIES, Saliency, scores
from ffprune.core.sparsegpt import reconstruct
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation
from ffprune.models.blocks import BlockWalk
from ffprune.models.view import ModelView


@dataclass(frozen=True)
class Quantisation:
    """GPTQ after pruning (MS Table 4).

    Attributes:
        bits: of a weight.
        group_size: neighbouring inputs that share a grid.
    """

    bits: int
    group_size: int


@dataclass(frozen=True)
class WeightPruning:
    """How the weights of a matrix are chosen, and what becomes of the others.

    Attributes:
        criterion: row of :data:`ffprune.core.saliency.SALIENCIES`.
        reconstruct: SparseGPT's blocked error compensation; False: the others stay as they are.
        pattern: ``2:4`` or ``4:8``: so many of every 4 or 8 neighbouring inputs stay; None: any.
        quantisation: of what is left; None: none.
        damping: of H, relative to its mean diagonal.
        weighted: whether tokens count by how much their unit depends on them, not all alike.
    """

    criterion: str
    reconstruct: bool
    pattern: str | None
    quantisation: Quantisation | None
    damping: float
    weighted: bool

    @property
    def whole_gram(self) -> bool:
        """Whether X^T X is needed, and not its diagonal alone."""
        return self.reconstruct or self.quantisation is not None or self._row.needs_inverse

    @property
    def calibrates(self) -> bool:
        """Whether any statistics are needed."""
        return self.whole_gram or self._row.reads_input

    @property
    def _row(self) -> Saliency:
        return look_up(SALIENCIES, self.criterion, "criterion")


@dataclass(frozen=True)
class PrunedMatrix:
    """What became of one matrix.

    Attributes:
        name: such as ``layers.3.down``.
        kept: weights that stay.
        damping: the largest that was used; more than asked where a Cholesky factorisation failed.
    """

    name: str
    kept: int
    damping: float


def prune(
    view: ModelView,
    allocation: Allocation,
    windows: Tensor,
    batch_size: int,
    how: WeightPruning,
    dense_inputs: bool,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[PrunedMatrix]:
    """Prune every prunable matrix of a model, in place.

    The statistics of all seven inputs of a layer are those of the layer as it still is, behind pruned layers (or,
    with ``dense_inputs``, behind dense ones); then the layer runs again, pruned, to feed the next (SparseGPT, Wanda).

    Args:
        view: the model's view; float32 is meant.
        allocation: weights kept per matrix, of ``view.weight_units``; one that keeps all only quantises.
        windows: int64 ``[n, seqlen]``, calibration text.
        batch_size: windows a forward pass.
        how: criterion, reconstruction, pattern, quantisation.
        dense_inputs: calibrate on the dense model's inputs.
        dtype: that layers multiply in; sums and reconstruction are float32 and float64.
        progress: told of layers done and in all.

    Raises:
        ParameterError: unknown criterion, or a pattern that does not fit a matrix's width or count.
        NonFiniteLoss: statistics are not finite.
    """
    kept = {unit.name: count for unit, count in zip(allocation.units, allocation.kept, strict=True)}
    facts: list[PrunedMatrix] = []
    if not how.calibrates:
        return [
            _prune_matrix(name, linear, Gram.zeros(linear.in_features, full=False), kept[name], how)
            for name, linear in view.prunable.items()
        ]
    walk = BlockWalk(view, windows, batch_size, dtype)
    # The sweep over columns is many small products: one matrix a thread is faster than several threads a product.
    workers = torch.get_num_threads() if view.model.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for block in view.blocks:
            grams, outputs = walk.observe(block.linears if how.whole_gram else (), how.weighted)
            work = [
                pool.submit(_prune_matrix, name := f"layers.{block.index}.{role}", linear, grams[role], kept[name], how)
                for role, linear in block.linears.items()
            ]
            facts += [matrix.result() for matrix in work]
            walk.advance(outputs if dense_inputs else None)
            if progress is not None:
                progress(block.index + 1, len(view.blocks))
    return facts


def _prune_matrix(name: str, linear: nn.Linear, gram: Gram, kept: int, how: WeightPruning) -> PrunedMatrix:
    weight = linear.weight.detach()
    damping, mask = how.damping, torch.ones_like(weight, dtype=torch.bool)
    if how.reconstruct and kept < weight.numel():
        assert gram.xx is not None
        found = reconstruct(weight, gram.xx, kept, how.criterion, how.pattern, damping=damping)
        weight, mask, damping = found.weight, found.mask, found.damping
    elif kept < weight.numel():
        importance = scores(how.criterion, weight, gram, damping)
        scope = SALIENCIES[how.criterion].scope
        mask = pattern_mask(importance, how.pattern) if how.pattern else keep_mask(importance, kept, scope)
        weight = weight * mask
    if how.quantisation is not None:
        assert gram.xx is not None
        quantised = quantise(
            weight, gram.xx, how.quantisation.bits, how.quantisation.group_size, mask=mask, damping=how.damping
        )
        weight, damping = quantised.weight, max(damping, quantised.damping)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return PrunedMatrix(name, int(mask.sum()), damping)


@dataclass
class MaskPlan:
    """Everything needed to set any allocation of weights on one model, without reconstruction: trials of a search.

    Attributes:
        view: the model that allocations are set on.
        weights: per matrix, its dense weights.
        ranks: per matrix, the order in which its weights go (:func:`ffprune.core.masks.ranks`).
        scope: within what weights are compared, ``row`` or ``matrix``.
    """

    view: ModelView
    weights: list[Tensor]
    ranks: list[Tensor]
    scope: Scope

    def apply(self, allocation: Allocation) -> None:
        """Make the model compute with this allocation: one comparison and one product a weight."""
        with torch.no_grad():
            for linear, dense, order, kept in zip(
                self.view.prunable.values(), self.weights, self.ranks, allocation.kept, strict=True
            ):
                torch.mul(dense, mask_from_ranks(order, kept, self.scope), out=linear.weight)


def prepare(view: ModelView, grams: dict[str, Gram], criterion: str, damping: float, dtype: torch.dtype) -> MaskPlan:
    """Order every matrix's weights once; the model is converted to ``dtype`` afterwards.

    Args:
        view: the dense model in full precision.
        grams: of the dense model, by name.
        criterion: row of :data:`ffprune.core.saliency.SALIENCIES`.
        damping: of H, where the criterion needs its inverse.
        dtype: of the model that allocations are tried on.
    """
    scope = look_up(SALIENCIES, criterion, "criterion").scope
    orders = [
        ranks(scores(criterion, linear.weight.detach(), grams[name], damping), scope)
        for name, linear in view.prunable.items()
    ]
    view.model.to(dtype=dtype)  # type: ignore[call-arg]
    for linear in view.prunable.values():
        linear.weight.requires_grad_(False)
    return MaskPlan(view, [linear.weight.detach().clone() for linear in view.prunable.values()], orders, scope)
