"""Hidden states carried through the decoder layer by layer: calibration in which a layer sees pruned predecessors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffprune.core.gram import Gram
from ffprune.models.view import ModelView
from ffprune.models.walk import check_windows, watch


class BlockWalk:
    """Hidden states of calibration windows, at the entrance of one decoder layer after the other.

    A layer runs with the arguments that the model itself passes it (masks, positions, rotary embeddings), recorded
    once beforehand: no loop over a family's internals that breaks with its next release.

    Args:
        view: the model's view; take the model in ``eval()``.
        windows: [n, seqlen] int64 token ids.
        batch_size: windows per forward pass.

    Attributes:
        view: the model's view.
        position: index of the layer that comes next.
        hidden: [n, seqlen, d] input of that layer, on the model's device, in its dtype.
        batches: rows of ``hidden`` in each batch.

    Raises:
        ParameterError: there are no windows.
    """

    def __init__(self, view: ModelView, windows: Tensor, batch_size: int) -> None:
        check_windows(windows, batch_size)
        self.view = view
        self.position = 0
        self.batches = [slice(i, min(i + batch_size, len(windows))) for i in range(0, len(windows), batch_size)]
        hidden = []
        # Batch size -> layer -> keyword arguments: without padding they depend on nothing else.
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        for rows in self.batches:
            entered, arguments = _record(view, windows[rows].to(view.model.device))
            hidden.append(entered)
            self._arguments.setdefault(len(entered), arguments)
        self.hidden = torch.cat(hidden)

    @property
    def layer(self) -> nn.Module:
        """The layer that comes next."""
        return self.view.blocks[self.position].layer

    def forward(self, hidden: Tensor, batch: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the layer that comes next; differentiable unless gradients are switched off.

        Args:
            hidden: [b, seqlen, d] with b the windows of that batch.
            batch: index in ``batches``.
            weights: role (q, k, v, o, gate, up, down) -> weight to compute with instead of the layer's own.

        Returns:
            [b, seqlen, d].
        """
        rows = self.batches[batch]
        arguments = self._arguments[rows.stop - rows.start][self.position]
        replaced = {}
        if weights:
            names = {id(module): name for name, module in self.layer.named_modules()}
            linears = self.view.blocks[self.position].linears
            replaced = {f"{names[id(linears[role])]}.weight": weight for role, weight in weights.items()}
        output = torch.func.functional_call(self.layer, replaced, (hidden,), arguments)
        assert isinstance(output, Tensor)
        return output

    def observe(self, full: Collection[str] = ()) -> tuple[dict[str, Gram], Tensor]:
        """Statistics of every linear's input in the layer that comes next, and what the layer answers.

        Args:
            full: roles whose whole X^T X is wanted; the others get diagonal and mean.

        Returns:
            Role -> Gram (q, k and v share one, gate and up too), and the outputs [n, seqlen, d]. Neither the layer
            nor the position changes.

        Raises:
            NonFiniteLoss: statistics are not finite; names the linear.
        """
        prefix = f"layers.{self.position}."
        with watch(self.view, (self.position,), {prefix + role for role in full}) as grams:
            outputs = self._outputs()
        return {name.removeprefix(prefix): gram for name, gram in grams.items()}, outputs

    def advance(self, outputs: Tensor | None = None) -> None:
        """Go to the next layer.

        Args:
            outputs: [n, seqlen, d], its inputs; None: what the layer answers now, perhaps changed since
                :meth:`observe`.
        """
        self.hidden = self._outputs() if outputs is None else outputs
        self.position += 1

    def _outputs(self) -> Tensor:
        # Not in inference mode: a later forward pass may carry gradients.
        with torch.no_grad():
            return torch.cat([self.forward(self.hidden[rows], i) for i, rows in enumerate(self.batches)])


def _record(view: ModelView, batch: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the first layer, and the keyword arguments of every layer, with no layer run."""
    entered: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def pass_on(hidden: Tensor, **kwargs: Any) -> Tensor:
        entered.append(hidden)
        arguments.append(kwargs)
        return hidden

    layers = [block.layer for block in view.blocks]
    for layer in layers:
        layer.forward = pass_on
    try:
        # Not in inference mode: the arguments serve forward passes with gradients too.
        with torch.no_grad():
            view.model.get_decoder()(input_ids=batch, use_cache=False)  # type: ignore[no-untyped-call]
    finally:
        for layer in layers:
            del layer.forward
    return entered[0], arguments
