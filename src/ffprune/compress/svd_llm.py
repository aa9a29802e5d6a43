"""Every linear as two thinner ones, by truncation-aware whitening alone (SVD-LLM, Wang et al. 2024, 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ffprune.core.errors import ParameterError
from ffprune.core.gram import Gram
from ffprune.core.whitening import Truncation, truncate
from ffprune.models.linear import linear_of
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView


class FactoredLinear(nn.Module):
    """A linear map through a narrow middle: left(right(x)).

    Args:
        linear: the dense map; its bias is kept, nothing of it is changed.
        factors: what takes the place of its weight.

    Attributes:
        right: ``in -> rank``, without bias.
        left: ``rank -> out``, with the dense map's bias where it has one.
    """

    def __init__(self, linear: nn.Linear, factors: Truncation) -> None:
        super().__init__()
        self.right = linear_of(factors.right)
        self.left = linear_of(factors.left)
        self.left.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        output: Tensor = self.left(self.right(x))
        return output


@dataclass(frozen=True)
class FactoredMatrix:
    """What became of one matrix.

    Attributes:
        name: such as ``layers.3.down``.
        rank: width between its two factors.
        damping: added to the diagonal of X^T X where its Cholesky factorisation failed, absolute; else 0.
        error: squared error of the output, summed over calibration tokens (:attr:`.Truncation.error`).
    """

    name: str
    rank: int
    damping: float
    error: float


@dataclass(frozen=True)
class Facts:
    """What became of a model.

    Attributes:
        matrices: one per prunable linear.
        prunable_before, prunable_after: weights of the decoder layers' linears (METHODS 1).
        params_before, params_after: parameters of the whole model, tied ones once.
    """

    matrices: tuple[FactoredMatrix, ...]
    prunable_before: int
    prunable_after: int
    params_before: int
    params_after: int


def rank_for(rows: int, columns: int, sparsity: float) -> int:
    """The largest rank whose two factors leave at most 1 - sparsity of a matrix's parameters.

    It is less than full at sparsity 0: two factors are dearer than the matrix from rank out in / (out + in) on.

    Args:
        rows: out_features.
        columns: in_features.
        sparsity: share of the parameters to go, in [0, 1).

    Raises:
        ParameterError: a sparsity out of range, or one that leaves no rank at all.
    """
    if not 0 <= sparsity < 1:
        raise ParameterError(f"Sparsity {sparsity} was asked for", "Sparsity is in [0, 1)", "Change the sparsity")
    rank = int(rows * columns * (1 - sparsity) / (rows + columns) + 1e-9)  # 1 - 0.9 is just below 0.1
    if rank == 0:
        raise ParameterError(
            f"Sparsity {sparsity} was asked for in a {rows} x {columns} matrix",
            f"It has {rows * columns} parameters, and a map of rank 1 has {rows + columns}",
            "Lower the sparsity",
        )
    return rank


def compress(
    view: ModelView,
    sparsity: float,
    grams: Iterable[Mapping[str, Gram]],
    progress: Callable[[int, int], None] | None = None,
) -> Facts:
    """Replace every prunable linear of a model by two, in place.

    The replaced linears leave the view (``view.prunable`` ends up empty): their weights are freed layer by layer.

    Args:
        view: the dense model's view.
        sparsity: share of every linear's parameters to go.
        grams: per layer, role -> Gram of the dense model with whole X^T X; may be lazy
            (:meth:`ffprune.models.calibration.Calibration.grams`).
        progress: told of layers done and in all.

    Raises:
        ParameterError: see :func:`rank_for`; raised before anything is changed. Or a Gram without X^T X.
        NonFiniteLoss: statistics are not finite.
    """
    ranks = {
        name: rank_for(linear.out_features, linear.in_features, sparsity) for name, linear in view.prunable.items()
    }
    prunable_before = sum(linear.weight.numel() for linear in view.prunable.values())
    params_before = param_count(view.model)
    matrices, factored = [], []
    for block, statistics in zip(view.blocks, grams, strict=True):
        paths = {id(module): path for path, module in block.layer.named_modules()}
        for role in tuple(block.linears):
            name = f"layers.{block.index}.{role}"
            linear = block.linears.pop(role)
            del view.prunable[name]
            factors = truncate(linear.weight.detach(), _whole(name, statistics[role]), ranks[name])
            factored.append(FactoredLinear(linear, factors))
            block.layer.set_submodule(paths[id(linear)], factored[-1])
            matrices.append(FactoredMatrix(name, ranks[name], factors.damping, factors.error))
        if progress is not None:
            progress(block.index + 1, len(view.blocks))
    prunable_after = sum(pair.left.weight.numel() + pair.right.weight.numel() for pair in factored)
    return Facts(tuple(matrices), prunable_before, prunable_after, params_before, param_count(view.model))


def _whole(name: str, gram: Gram) -> Tensor:
    if gram.xx is None:
        raise ParameterError(
            f"{name} is to be factored from the diagonal of X^T X alone",
            "Whitening needs the whole X^T X of every linear's input",
            "Collect the statistics with all prunable linears in `full`, or use Calibration.grams",
        )
    return gram.xx
