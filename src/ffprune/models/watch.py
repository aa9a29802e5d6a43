"""What enters the prunable linears while layers run: a Gram each, of tokens that count alike or by their weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ffprune.core.errors import NonFiniteLoss, ParameterError
from ffprune.core.gram import Gram
from ffprune.models.experts import add_inputs
from ffprune.models.view import ModelView, UnitLinears


def check_windows(windows: Tensor, batch_size: int) -> None:
    """Refuse calibration on nothing.

    Raises:
        ParameterError: ``windows`` is not a non-empty [n, seqlen] tensor, or ``batch_size`` is below 1.
    """
    if windows.ndim != 2 or windows.numel() == 0 or batch_size < 1:
        raise ParameterError(
            f"Calibration was asked for on windows of shape {tuple(windows.shape)}, {batch_size} at a time",
            "It needs a non-empty [n, seqlen] tensor of token ids and a batch size of at least 1",
            "Raise the number of calibration windows, their length or the batch size",
        )


@contextmanager
def watch(view: ModelView, layers: Iterable[int], full: Collection[str]) -> Iterator[dict[str, Gram]]:
    """While open, every input of these layers' linears is added to its Gram; at the end the Grams are checked.

    Args:
        view: the model's view.
        layers: indices of decoder layers.
        full: names from ``view.prunable`` whose whole X^T X is wanted; the others get diagonal and mean.

    Yields:
        Name -> Gram, on the linear's device, filled as the layers run. Linears that read the same input share one.

    Raises:
        NonFiniteLoss: statistics are not finite; names the first such linear.
    """
    grams: dict[str, Gram] = {}
    hooks = []
    for names, blocks in _shared_inputs(view, set(layers)):
        linear = view.prunable[names[0]]
        gram = Gram.zeros(linear.in_features, any(name in full for name in names), linear.weight.device, blocks)
        grams.update(dict.fromkeys(names, gram))
        hooks.append(linear.register_forward_pre_hook(_updater(gram)))
    with _hooked(grams, hooks):
        yield grams


@contextmanager
def watch_weighted(view: ModelView, layer: int, full: Collection[str], seed: int) -> Iterator[dict[str, Gram]]:
    """:func:`watch` for one layer, every token weighted by how much its unit depends on the map's output there.

    The weight of a token is E ||d<R, Y> / dy||^2, with Y the unit's output for all tokens, y the map's own output for
    that one and R random signs: its squared Jacobian, summed over all tokens it reaches. Attention makes tokens
    unequal. The value of the first one, on which many heads rest, is read by all that follow, and a plain Gram counts
    it as one among hundreds. Token weights by attention are RSQ's (Sung et al. 2025, section 4); here one backward
    pass through the unit gives them, whatever its attention computes, to q, k, gate and up as well.

    Layers must run with gradients enabled while this is open; a unit's last map sees its tokens as they are.

    Args:
        view: the model's view.
        layer: index of the decoder layer.
        full: names from ``view.prunable`` whose whole X^T X is wanted; the others get diagonal and mean.
        seed: of the signs.

    Yields:
        Name -> Gram, one for every linear; sums are of weighted tokens, counts of tokens.

    Raises:
        NonFiniteLoss: statistics are not finite; names the first such linear.
    """
    grams: dict[str, Gram] = {}
    hooks = []
    generator = torch.Generator().manual_seed(seed)
    for _, parts in _units_of(view, (layer,)):
        names = {role: f"layers.{layer}.{role}" for role in parts.all}
        for role, linear in parts.all.items():
            grams[names[role]] = Gram.zeros(linear.in_features, names[role] in full, linear.weight.device)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks += [part.register_forward_hook(_cutter(seen, names[role])) for role, part in parts.inputs.items()]
        hooks.append(parts.last.register_forward_hook(_weigher(seen, grams, names[parts.last_role], generator)))
    with _hooked(grams, hooks):
        yield grams


@contextmanager
def _hooked(grams: dict[str, Gram], hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that fill Grams go at the end, and the Grams are checked."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, gram in grams.items():
        check_finite(name, gram)


def _cutter(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., Tensor]:
    """The unit's graph begins at this map's output."""

    def cut(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        seen[name] = inputs[0].detach(), leaf
        return leaf

    return cut


def _weigher(
    seen: dict[str, tuple[Tensor, Tensor]], grams: dict[str, Gram], name: str, generator: torch.Generator
) -> Callable[..., Tensor]:
    """The unit's graph ends at this map's output: weigh what was seen, and go on without a graph."""

    def weigh(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        gradients = torch.autograd.grad((output * signs).sum(), [leaf for _, leaf in seen.values()])
        for (key, (tokens, _leaf)), gradient in zip(seen.items(), gradients, strict=True):
            grams[key].update(tokens * gradient.float().square().sum(-1, keepdim=True).sqrt())
        grams[name].update(inputs[0])
        seen.clear()
        return output.detach()

    return weigh


def _shared_inputs(view: ModelView, layers: Collection[int]) -> list[tuple[tuple[str, ...], int]]:
    """Names of linears that read the same input, and the blocks of its Gram, input by input."""
    return [
        (tuple(f"layers.{layer}.{role}" for role in roles), blocks)
        for layer, parts in _units_of(view, layers)
        for roles, blocks in ((tuple(parts.inputs), 1), ((parts.last_role,), parts.blocks))
    ]


def _units_of(view: ModelView, layers: Collection[int]) -> Iterator[tuple[int, UnitLinears]]:
    """Layer and all linears of the attention and the FFN in some layers."""
    for block in view.blocks:
        if block.index in layers:
            # Keys and values are watched whether they can go or not.
            yield block.index, block.unit_linears("attention", "group")
            yield block.index, block.unit_linears("ffn")


def _updater(gram: Gram) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def update(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        add_inputs(gram, module, inputs)

    return update


def check_finite(name: str, gram: Gram) -> None:
    """Refuse statistics that are not finite.

    Raises:
        NonFiniteLoss: names the linear.
    """
    sums = [gram.total, gram.diag] if gram.xx is None else [gram.total, gram.diag, gram.xx]
    if not all(bool(torch.isfinite(s).all()) for s in sums):
        raise NonFiniteLoss(
            f"The inputs of {name} are not finite over {gram.count} calibration tokens",
            "Pruning and repair need finite statistics; earlier layers' inputs were finite",
            "Check the model's weights, or load it as float32 if it runs in float16",
        )
