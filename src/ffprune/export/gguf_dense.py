"""What a GGUF file's model was cut from: the dense model's widths among the metadata, which llama.cpp ignores.

Layers that lost alike make an ordinary ``llama``, whose own metadata tell the present widths alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from ffprune.models.layer_config import LayerShape
from ffprune.models.weights import CorruptModel

_KEYS = (
    "ffprune.dense.attention.head_count",
    "ffprune.dense.attention.head_count_kv",
    "ffprune.dense.feed_forward_length",
)
"""Of the fields of a :class:`LayerShape`, named after llama.cpp's own."""
_CHANNELS = "ffprune.feed_forward_length"
"""FFN channels of every layer where the file has others, which zeros fill up."""
JSON_KEYS = ("dense", "unfilled_channels", "removed")
"""What :meth:`Cut.to_json` tells."""


@dataclass(frozen=True)
class Cut:
    """What a file tells of the model that its own was cut from.

    Attributes:
        dense: a layer of the dense model.
        channels: FFN channels of every layer, without those of zeros that fill them up.
        removed: share of the dense model's prunable weights that are gone.
    """

    dense: LayerShape
    channels: list[int]
    removed: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, beside those of :class:`ffprune.export.gguf_check.Contents`, whose channels are the file's."""
        return dict(zip(JSON_KEYS, (self.dense._asdict(), self.channels, self.removed), strict=True))


def add_dense(writer: gguf.GGUFWriter, dense: LayerShape, channels: Sequence[int], filled: Sequence[int]) -> None:
    """Tell the widths of the dense model.

    Args:
        writer: of the file.
        dense: a layer of the dense model.
        channels: FFN channels of every layer.
        filled: the same as they are in the file.
    """
    for key, width in zip(_KEYS, dense, strict=True):
        writer.add_uint32(key, width)
    if list(channels) != list(filled):
        writer.add_array(_CHANNELS, list(channels))


def read_cut(path: Path, fields: Mapping[str, Any], widths: Sequence[list[int]]) -> Cut | None:
    """What a file tells of the dense model; None where it tells nothing.

    Args:
        path: the file.
        fields: its metadata, as gguf's reader has them.
        widths: query heads, key/value heads and FFN channels of every layer.

    Raises:
        CorruptModel: what it tells cannot be.
    """
    if not any(key in fields for key in _KEYS):
        return None
    told = _integers([fields[key].contents() if key in fields else None for key in _KEYS])
    heads, groups, filled = widths
    channels = _integers(fields[_CHANNELS].contents()) if _CHANNELS in fields else filled
    if told is None or channels is None or len(channels) != len(filled):
        raise _bad(path, "are no numbers, or not one a layer")
    dense = LayerShape(*told)
    layers = [LayerShape(*layer) for layer in zip(heads, groups, channels, strict=True)]
    if any(now > whole for layer in layers for now, whole in zip(layer, dense, strict=True)):
        raise _bad(path, f"are {told}, and a layer has more")
    if any(now > most for now, most in zip(channels, filled, strict=True)):
        raise _bad(path, f"are {channels} FFN channels before they were filled up, and the file has fewer")
    head = _head_width(fields)
    left = sum(_weights(layer, head) for layer in layers)
    return Cut(dense, channels, 1 - left / (len(layers) * _weights(dense, head)))


def _integers(values: Any) -> list[int] | None:
    """The values, if they are integers."""
    return values if isinstance(values, list) and all(type(value) is int for value in values) else None


def _head_width(fields: Mapping[str, Any]) -> int:
    return int(fields[f"{fields['general.architecture'].contents()}.attention.key_length"].contents())


def _weights(layer: LayerShape, head: int) -> int:
    """Weights of a Llama layer's linear projections, for every one of the hidden width."""
    return 2 * head * (layer.heads + layer.groups) + 3 * layer.channels


def _bad(path: Path, found: str) -> CorruptModel:
    return CorruptModel(
        f"The dense model's widths that {path} tells {found}",
        "The keys ffprune.* tell query heads, key/value heads and FFN channels of what the file's model was cut from",
        "Export it again",
    )
