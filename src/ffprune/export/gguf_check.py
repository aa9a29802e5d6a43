"""A GGUF file read back: whether its metadata, tensors, size and checksum agree with each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf

from ffprune.core.errors import MissingInput
from ffprune.export.gguf_seal import check_seal
from ffprune.models.weights import CorruptModel


@dataclass(frozen=True)
class Contents:
    """A GGUF file that is whole.

    Attributes:
        architecture: ``llama`` or ``deci``, as llama.cpp calls it.
        formats: number format -> how many tensors have it; those that could not be quantised are told apart here.
        heads: query heads of every layer.
        groups: key/value heads of every layer.
        channels: FFN channels of every layer.
        bytes: of the file.
        sealed: whether it has a checksum, which was compared.
    """

    architecture: str
    formats: dict[str, int]
    heads: list[int]
    groups: list[int]
    channels: list[int]
    bytes: int
    sealed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_gguf(path: Path) -> Contents:
    """Check that a file of a Llama is whole and that every layer has the widths its metadata tell.

    Raises:
        MissingInput: there is no such file.
        CorruptModel: it is cut short, damaged or changed, or metadata and tensors contradict each other.
    """
    if not path.is_file():
        raise MissingInput(f"{path} was to be read", "there is no such file", "name a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        heads, groups, channels = _check(reader)
        return Contents(
            reader.fields["general.architecture"].contents(),
            dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
            heads,
            groups,
            channels,
            bytes=path.stat().st_size,
            sealed=check_seal(path, reader),
        )
    except (ValueError, KeyError, IndexError, OverflowError, AttributeError, TypeError) as error:
        raise CorruptModel(
            f"{path} is not a whole GGUF file: {error}",
            "Its metadata tell the widths of every layer, and its tensors have them",
            "Export it again",
        ) from error


def _check(reader: gguf.GGUFReader) -> list[list[int]]:
    """Query heads, key/value heads and channels of every layer, compared with the tensors."""
    arch = reader.fields["general.architecture"].contents()

    def told(key: str) -> Any:
        return reader.fields[f"{arch}.{key}"].contents()

    blocks, head, hidden = told("block_count"), told("attention.key_length"), told("embedding_length")
    found = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    expected = {"token_embd.weight": [hidden, tokens], "output_norm.weight": [hidden]}
    per_layer = {
        key: value if isinstance(value := told(key), list) else [value] * blocks
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    }
    for key, counts in per_layer.items():
        if len(counts) != blocks:
            raise ValueError(f"{key} tells of {len(counts)} layers, block_count of {blocks}")
    for layer, (query, groups, channels) in enumerate(zip(*per_layer.values(), strict=True)):
        expected |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": [hidden],
                "ffn_norm": [hidden],
                "attn_q": [hidden, query * head],
                "attn_k": [hidden, groups * head],
                "attn_v": [hidden, groups * head],
                "attn_output": [query * head, hidden],
                "ffn_gate": [hidden, channels],
                "ffn_up": [hidden, channels],
                "ffn_down": [channels, hidden],
            }.items()
        }
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ValueError(f"{name} should be {shape} and is {found.get(name, 'missing')}")
    optional = {"output.weight", "rope_freqs.weight"}
    if strange := [name for name in found if name not in {*expected, *optional} and not name.endswith(".bias")]:
        raise ValueError(f"it has a tensor {strange[0]!r}")
    return list(per_layer.values())
