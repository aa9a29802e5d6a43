"""Sequential onloading: one decoder layer's weights on the device, while it is run; all others rest on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Onload:
    """The one place on the device that the decoder layers of a model take turns in.

    A layer that runs is brought to where the input embeddings are, in their number format, and stays until another
    layer runs: batch after batch of a walk, it moves once. What a layer's weights rested as is kept. They become that
    again, unless they were replaced or written to meanwhile: then they go to the CPU, in the number format they rested
    in. So weights rest as they are in a mapped file, until they are changed.

    (accelerate's ``cpu_offload`` leaves weights on the meta device between runs, where none can be ranked or cut; its
    ``CpuOffload`` copies weights back that nobody changed, and so reads a mapped file into memory.)

    Args:
        model: whose ``forward`` of every layer changes; the embeddings, the last norm and the head stay where they are.
        layers: its decoder layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        self._embeddings: nn.Module = model.get_input_embeddings()
        self._here: nn.Module | None = None
        self._rest = torch.float32
        # (on the device, at rest, version on the device)
        self._moved: list[tuple[nn.Parameter, nn.Parameter, int]] = []
        for layer in layers:
            layer.forward = partial(self._run, layer)

    def bring(self, layer: nn.Module) -> None:
        """Bring a layer's weights to the device; the layer that was there goes."""
        place = self._embeddings.weight
        assert isinstance(place, nn.Parameter)
        if layer is not self._here:
            self.release()
            self._here, self._rest = layer, next(layer.parameters()).dtype
        # Not in inference mode: what is brought while a text is scored may be cut, or differentiated through, later.
        with torch.inference_mode(False), torch.no_grad():
            for module, name, weight in _weights(layer):
                moved = weight.to(place.device, place.dtype)
                if moved is not weight:
                    there = nn.Parameter(moved, requires_grad=False)
                    setattr(module, name, there)
                    self._moved.append((there, weight, there._version))

    def release(self) -> None:
        """Let the layer that is on the device go back to rest."""
        if self._here is None:
            return
        unchanged = {id(there): weight for there, weight, version in self._moved if there._version == version}
        with torch.inference_mode(False), torch.no_grad():
            for module, name, weight in _weights(self._here):
                resting = unchanged.get(id(weight), weight).to("cpu", self._rest)
                if resting is not weight:
                    own = isinstance(resting, nn.Parameter)
                    setattr(module, name, resting if own else nn.Parameter(resting, requires_grad=False))
        self._here, self._moved = None, []

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.bring(layer)
        return type(layer).forward(layer, *args, **kwargs)


def _weights(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name in it, weight) of every weight of a layer."""
    for module in list(layer.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            yield module, name, weight
