"""Hidden states carried through the decoder layer by layer: calibration in which a layer sees pruned predecessors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffprune.core.errors import UnsupportedArchitecture
from ffprune.core.gram import Gram
from ffprune.core.stream import Moments
from ffprune.models.experts import ExpertOutput, add_inputs
from ffprune.models.view import ModelView
from ffprune.models.watch import check_finite, check_windows, watch, watch_weighted


@dataclass(frozen=True)
class LayerEnd:
    """What a layer's last map gets, and what the layer answers.

    Attributes:
        inputs: per batch, [b, seqlen, width] of the map, on the CPU.
        stream: per batch, [b, seqlen, d], the layer's output, on the CPU.
    """

    inputs: list[Tensor]
    stream: list[Tensor]

    def replaced(self, last: nn.Linear, columns: Tensor, weight: Tensor) -> Tensor:
        """The layer's output, were its last map another one.

        Args:
            last: its last map as it was.
            columns: [k] int64, the inputs that the other map reads.
            weight: [d, k], the other map; the bias stays.

        Returns:
            [n, seqlen, d], on the CPU.
        """
        outputs = []
        with torch.no_grad():
            for batch, stream in zip(self.inputs, self.stream, strict=True):
                inputs = batch.to(weight.device, weight.dtype)  # autocast hands them over in its own
                difference = linear(inputs[..., columns], weight) - linear(inputs, last.weight)
                outputs.append(stream + difference.cpu())
        return torch.cat(outputs)


@dataclass(frozen=True)
class Distance:
    """How far the residual stream behind a unit is from a target.

    Attributes:
        fit: moments of three quarters of the batches.
        held: moments of every fourth batch.
        end: of the layer, where the unit is the last in it; None behind the attention, where the layer goes on.
    """

    fit: Moments
    held: Moments
    end: LayerEnd | None


class _Enough(Exception):
    """Ends a forward pass that nothing more is wanted of."""


class BlockWalk:
    """Hidden states of calibration windows, at the entrance of one decoder layer after the other.

    A layer runs with the arguments that the model itself passes it (masks, positions, rotary embeddings), recorded
    once beforehand: no loop over a family's internals that breaks with its next release.

    The order of the loops is what lets a model be larger than the device: all batches go through one layer, then all
    through the next. Hidden states rest on the CPU, and a batch at a time is where the layer is. With a model whose
    layers are brought to the device in turn (:mod:`ffprune.models.onload`), a layer moves once.

    Args:
        view: the model's view; take the model in ``eval()``.
        windows: [n, seqlen] int64 token ids.
        batch_size: windows per forward pass.
        dtype: that layers multiply in, by autocast; hidden states and what is observed stay in the model's dtype.

    Attributes:
        view: the model's view.
        position: index of the layer that comes next.
        hidden: [n, seqlen, d] input of that layer, on the CPU, in the model's dtype.
        batches: rows of ``hidden`` in each batch.

    Raises:
        ParameterError: there are no windows.
    """

    def __init__(self, view: ModelView, windows: Tensor, batch_size: int, dtype: torch.dtype = torch.float32) -> None:
        check_windows(windows, batch_size)
        self.view = view
        self._dtype = dtype
        self.position = 0
        self.batches = [slice(i, min(i + batch_size, len(windows))) for i in range(0, len(windows), batch_size)]
        hidden = []
        # Batch size -> layer -> arguments: without padding they depend on nothing else.
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        for rows in self.batches:
            entered, arguments = _record(view, windows[rows].to(view.model.device))
            hidden.append(entered.cpu())
            self._arguments.setdefault(len(entered), arguments)
        self.hidden = torch.cat(hidden)

    @property
    def layer(self) -> nn.Module:
        """The layer that comes next."""
        return self.view.blocks[self.position].layer

    def arrive(self) -> torch.device:
        """Where the layer that comes next computes; its weights are there from now on."""
        if self.view.onload is not None:
            self.view.onload.bring(self.layer)
        return next(self.layer.parameters()).device

    def forward(self, hidden: Tensor, batch: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the layer that comes next; differentiable unless gradients are switched off.

        Args:
            hidden: [b, seqlen, d] with b the windows of that batch, anywhere.
            batch: index in ``batches``.
            weights: role (q, k, v, o, gate, up, down) -> weight to compute with instead of the layer's own.

        Returns:
            [b, seqlen, d], where the layer is.
        """
        device = self.arrive()
        rows = self.batches[batch]
        arguments, named = self._arguments[rows.stop - rows.start][self.position]
        replaced = {}
        if weights:
            names = {id(module): name for name, module in self.layer.named_modules()}
            linears = self.view.blocks[self.position].linears
            replaced = {f"{names[id(linears[role])]}.weight": weight for role, weight in weights.items()}
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = torch.func.functional_call(self.layer, replaced, (hidden.to(device), *arguments), named)
        assert isinstance(output, Tensor)
        return output

    def observe(self, full: Collection[str] = (), weighted: bool = False) -> tuple[dict[str, Gram], Tensor]:
        """Statistics of every linear's input in the layer that comes next, and what the layer answers.

        Args:
            full: roles whose whole X^T X is wanted; the others get diagonal and mean.
            weighted: tokens count by how much their unit depends on them (:func:`ffprune.models.watch.watch_weighted`).

        Returns:
            Role -> Gram (q, k and v share one, gate and up too, unless tokens are weighted) where the layer is, and the
            outputs [n, seqlen, d] on the CPU. Neither the layer nor the position changes.

        Raises:
            NonFiniteLoss: statistics are not finite; names the linear.
        """
        prefix = f"layers.{self.position}."
        self.arrive()  # the Grams are where the weights are
        names = {prefix + role for role in full}
        if weighted:
            watching = watch_weighted(self.view, self.position, names, seed=self.position)
        else:
            watching = watch(self.view, (self.position,), names)
        with watching as grams:
            outputs = self._outputs(gradients=weighted)
        return {name.removeprefix(prefix): gram for name, gram in grams.items()}, outputs

    def arriving(self, role: str, whole: bool) -> Gram:
        """Statistics of one linear's input in the layer that comes next, which runs no further than that.

        Args:
            role: of the linear.
            whole: whether all of X^T X is wanted, or diagonal and mean.

        Raises:
            NonFiniteLoss: statistics are not finite.
        """
        linear = self.view.blocks[self.position].linears[role]
        blocks = linear.experts if isinstance(linear, ExpertOutput) else 1
        gram = Gram.zeros(linear.in_features, whole, self.arrive(), blocks)

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add_inputs(gram, module, inputs)
            raise _Enough

        hook = linear.register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                for batch, rows in enumerate(self.batches):
                    with suppress(_Enough):
                        self.forward(self.hidden[rows], batch)
        finally:
            hook.remove()
        check_finite(f"layers.{self.position}.{role}", gram)
        return gram

    def streams(self) -> dict[str, Tensor]:
        """The residual stream behind each unit of the layer that comes next, as the layer is now.

        Returns:
            ``o`` -> [n, seqlen, d] behind the attention, ``down`` -> behind the FFN: the layer's output; on the CPU.

        Raises:
            UnsupportedArchitecture: the layer does more with its units' outputs than add them (norms behind them).
        """
        after: dict[str, list[Tensor]] = {"o": [], "down": []}
        with torch.no_grad():
            for i, rows in enumerate(self.batches):
                with self._watch("o") as attention, self._watch("down") as ffn:
                    output = self.forward(self.hidden[rows], i)
                middle = self.hidden[rows].to(output.device) + attention["output"]
                after["down"].append(output.cpu())
                after["o"].append(middle.cpu())
                # The same whether the FFN comes after the attention or beside it.
                if (middle + ffn["output"].view_as(output) - output).norm() > 0.05 * output.norm():
                    raise UnsupportedArchitecture(
                        f"Layer {self.position} of {type(self.view.model).__name__} is not the sum of its input, its "
                        "attention and its FFN",
                        "Following the dense model's residual stream needs outputs that are added as they are",
                        "Use the repair ridge",
                    )
        return {role: torch.cat(pieces) for role, pieces in after.items()}

    def distance(self, role: str, target: Tensor) -> Distance:
        """How far the residual stream behind a unit of the layer that comes next is from a target.

        Args:
            role: ``o`` or ``down``, whose weights are the dense ones.
            target: [n, seqlen, d], the stream wanted behind the unit, on the CPU.

        Raises:
            NonFiniteLoss: statistics are not finite.
        """
        last = self.view.blocks[self.position].linears[role]
        device = self.arrive()
        sums = [Moments.zeros(last.in_features, last.out_features, device) for _ in range(2)]
        inputs, streams = [], []
        with torch.no_grad():
            for i, rows in enumerate(self.batches):
                stream = self.hidden[rows].to(device)
                # What follows the attention's last map is not needed.
                with self._watch(role, last=role == "o") as seen, suppress(_Enough):
                    stream = self.forward(stream, i)
                if role == "o":
                    stream = stream + seen["output"].view_as(stream)
                sums[i % 4 == 3].update(seen["input"], target[rows].to(device) - stream)
                if role == "down":
                    inputs.append(seen["input"].view(len(target[rows]), -1, last.in_features).cpu())
                    streams.append(stream.cpu())
        for moments in sums:
            check_finite(f"layers.{self.position}.{role}", moments.gram)
        return Distance(sums[0], sums[1], LayerEnd(inputs, streams) if inputs else None)

    @contextmanager
    def _watch(self, role: str, last: bool = False) -> Iterator[dict[str, Tensor]]:
        """While open, the last input and output of one linear of the layer that comes next, which may end there."""
        seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.update(input=inputs[0], output=output)
            if last:
                raise _Enough

        hook = self.view.blocks[self.position].linears[role].register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def advance(self, outputs: Tensor | None = None) -> None:
        """Go to the next layer.

        Args:
            outputs: [n, seqlen, d], its inputs; None: what the layer answers now, perhaps changed since
                :meth:`observe`.
        """
        self.hidden = self._outputs() if outputs is None else outputs.cpu()
        self.position += 1

    def _outputs(self, gradients: bool = False) -> Tensor:
        # Not in inference mode: a later forward pass may carry gradients.
        with torch.set_grad_enabled(gradients):
            return torch.cat([self.forward(self.hidden[rows], i).detach().cpu() for i, rows in enumerate(self.batches)])


def _record(view: ModelView, batch: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What enters the first layer, and the other arguments of every layer, with no layer run."""
    entered: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden)
        arguments.append((args, kwargs))
        return hidden

    layers = [block.layer for block in view.blocks]
    # Those that move weights or inputs to a device (ours and accelerate's) have put a forward of their own there.
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = pass_on
    try:
        # Not in inference mode: the arguments serve forward passes with gradients too.
        with torch.no_grad():
            view.model.get_decoder()(input_ids=batch, use_cache=False)  # type: ignore[no-untyped-call]
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return entered[0], arguments
