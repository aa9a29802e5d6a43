"""A GGUF file read back: whether its metadata, tensors, size and checksum agree with each other."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf

from ffprune.core.errors import MissingInput
from ffprune.export.gguf_dense import JSON_KEYS, Cut, read_cut
from ffprune.export.gguf_seal import check_seal
from ffprune.models.weights import CorruptModel

_BIAS = re.compile(r"blk\.\d+\.(\w+)\.bias")


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
        cut: what it tells of the dense model; None where it tells nothing.
    """

    architecture: str
    formats: dict[str, int]
    heads: list[int]
    groups: list[int]
    channels: list[int]
    bytes: int
    sealed: bool
    cut: Cut | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the dense model null where nothing is told."""
        own = asdict(self)
        del own["cut"]
        return own | (dict.fromkeys(JSON_KEYS) if self.cut is None else self.cut.to_json())


def check_gguf(path: Path) -> Contents:
    """Check that a file of a Llama is whole: the tensors that its metadata tell of, as wide as they say, and no more.

    Raises:
        MissingInput: there is no such file.
        CorruptModel: it is cut short, damaged or changed, or metadata and tensors contradict each other.
    """
    if not path.is_file():
        raise MissingInput(f"{path} was to be read", "there is no such file", "name a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        heads, groups, channels = _check(reader, path.stat().st_size)
        return Contents(
            reader.fields["general.architecture"].contents(),
            dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
            heads,
            groups,
            channels,
            bytes=path.stat().st_size,
            sealed=check_seal(path, reader),
            cut=read_cut(path, reader.fields, (heads, groups, channels)),
        )
    except (ValueError, KeyError, IndexError, OverflowError, AttributeError, TypeError) as error:
        raise CorruptModel(
            f"{path} is not a whole GGUF file: {error}",
            "Its metadata tell the widths of every layer, and its tensors have them",
            "Export it again",
        ) from error


def _check(reader: gguf.GGUFReader, size: int) -> list[list[int]]:
    """Query heads, key/value heads and channels of every layer, compared with the tensors; and these with the file."""
    arch = reader.fields["general.architecture"].contents()

    def told(key: str) -> Any:
        return reader.fields[f"{arch}.{key}"].contents()

    blocks, head, hidden = told("block_count"), told("attention.key_length"), told("embedding_length")
    found = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    if not 0 < blocks <= len(found):  # before anything is made for every layer
        raise ValueError(f"block_count tells of {blocks} layers, and there are {len(found)} tensors")
    per_layer = {
        key: value if isinstance(value := told(key), list) else [value] * blocks
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    }
    for key, counts in per_layer.items():
        if len(counts) != blocks:
            raise ValueError(f"{key} tells of {len(counts)} layers, block_count of {blocks}")
    embedding = [hidden, len(reader.fields["tokenizer.ggml.tokens"].data)]
    expected = {"token_embd.weight": embedding, "output_norm.weight": [hidden]}
    # An untied head, and rotary frequencies that are scaled.
    optional = {"output.weight": embedding, "rope_freqs.weight": [head // 2]}
    expected |= {name: shape for name, shape in optional.items() if name in found}
    # A linear has a bias in all layers, or in none.
    biased = {match[1] for name in found if (match := _BIAS.fullmatch(name))}
    for layer, (query, groups, channels) in enumerate(zip(*per_layer.values(), strict=True)):
        linears = {
            "attn_q": [hidden, query * head],
            "attn_k": [hidden, groups * head],
            "attn_v": [hidden, groups * head],
            "attn_output": [query * head, hidden],
            "ffn_gate": [hidden, channels],
            "ffn_up": [hidden, channels],
            "ffn_down": [channels, hidden],
        }
        weights = {"attn_norm": [hidden], "ffn_norm": [hidden], **linears}
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in weights.items()}
        expected |= {f"blk.{layer}.{name}.bias": shape[1:] for name, shape in linears.items() if name in biased}
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ValueError(f"{name} should be {shape} and is {found.get(name, 'missing')}")
    if strange := [name for name in found if name not in expected]:
        raise ValueError(f"it has a tensor {strange[0]!r}")
    _check_places(reader, size)
    return list(per_layer.values())


def _check_places(reader: gguf.GGUFReader, size: int) -> None:
    """Refuse bytes that belong to no tensor: each begins where the one before ends, and the file ends with the last."""
    end = place = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise ValueError(f"{tensor.name} should begin at byte {place} and begins at {tensor.data_offset}")
        end = place + int(tensor.n_bytes)
        place = -(-end // reader.alignment) * reader.alignment
    if size not in (end, place):  # some programs fill up the last one too, as we do
        raise ValueError(f"its last tensor ends at byte {end}, and it has {size} bytes")
