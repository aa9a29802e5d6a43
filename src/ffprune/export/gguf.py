"""GGUF for llama.cpp. Its architecture ``deci`` is a Llama with head counts and FFN widths of every layer's own.

What llama.cpp does to such files without a word is avoided here:

- A layer with attention and an FFN of width 0 loses its attention (and the last layer crashes the program): a width
  of 0 becomes 32 channels of zeros.
- The width of a head follows from layer 0 where it is not written down: it always is.
- Rotary positions pair neighbouring rows of q and k, transformers pairs rows half a head apart: the rows are
  reordered, head by head, with the layer's own number of heads.
- The row length of ``ffn_down`` is the FFN width, and a row that is no multiple of 32 is not quantised: widths are
  filled up with channels of zeros, which compute nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.tables import look_up
from ffprune.export.extras import needed
from ffprune.export.gguf_check import Contents, check_gguf
from ffprune.export.gguf_dense import add_dense
from ffprune.export.gguf_quantize import quantize
from ffprune.export.gguf_seal import add_seal, close_seal
from ffprune.export.gguf_tensors import BLOCK, Entry, llama_entries
from ffprune.export.gguf_vocabulary import read_vocabulary
from ffprune.models.layer_config import dense_shape_told
from ffprune.models.view import ModelView

Format = gguf.GGMLQuantizationType

#: Families that compute what llama.cpp's ``llama`` and ``deci`` do; Qwen2 is a Llama with biases.
MODEL_TYPES = ("llama", "mistral", "qwen2")
_STATIC_ROPE = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Kind:
    """A number format of the weights.

    Attributes:
        matrix: of matrices; vectors are float32.
        file_type: what llama.cpp calls the whole.
        quantized_by_llama: whether llama.cpp quantises it, from a file in ``matrix``.
    """

    matrix: Any
    file_type: int
    quantized_by_llama: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether rows are quantised in blocks."""
        return self.quantized_by_llama or self.matrix is Format.Q8_0


KINDS: dict[str, Kind] = {
    "f32": Kind(Format.F32, gguf.LlamaFileType.ALL_F32),
    "f16": Kind(Format.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": Kind(Format.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": Kind(Format.F32, gguf.LlamaFileType.MOSTLY_Q4_K_M, quantized_by_llama=True),
}


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: str = "f16",
    name: str = "model",
    license: str | None = None,
) -> Contents:
    """Write a model and its tokenizer as one GGUF file, with a checksum inside, and read it back.

    Layers all alike make an ordinary ``llama``; else the architecture is ``deci``. Weights are converted one at a time.
    Of a pruned model the file tells the dense model's widths too (:mod:`ffprune.export.gguf_dense`).

    Args:
        model: dense or pruned, on the CPU; not changed.
        tokenizer: its tokenizer.
        path: the file.
        kind: ``f32``, ``f16``, ``q8_0``, or ``q4_k_m``, which llama.cpp itself quantises from a temporary float32 file.
        name: what programs show.
        license: of the model, as an SPDX identifier; None: unknown, and left out.

    Returns:
        What the file holds.

    Raises:
        UnsupportedArchitecture: llama.cpp would compute something else.
        UnsupportedTokenizer: see :func:`ffprune.export.gguf_vocabulary.read_vocabulary`.
        ParameterError: no such kind, or weights that float16 cannot hold.
        MissingInput: q4_k_m without llama-cpp-python.
        QuantizationFailed: llama.cpp refused or crashed.
        CorruptModel: the file is not what was written.
    """
    row = look_up(KINDS, kind, "--type")
    view = ModelView(model)
    _check_architecture(model.config)
    entries = list(llama_entries(view, BLOCK if row.in_blocks else 1))
    _check_nothing_left(model, entries)
    vocabulary = read_vocabulary(tokenizer, entries[0].shape[0])
    if row.quantized_by_llama:
        needed("llama_cpp", "llama-cpp")
    written = path.with_name(f"{path.name}.f32") if row.quantized_by_llama else path
    widths = _layer_widths(view, entries)
    writer = gguf.GGUFWriter(written, "llama" if all(len(set(counts)) == 1 for counts in widths) else "deci")
    try:
        writer.add_type("model")
        writer.add_name(name)
        if license is not None:
            writer.add_license(license)
        writer.add_file_type(row.file_type)
        if row.in_blocks:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, view, entries[0].shape, widths)
        if (dense := dense_shape_told(model.config)) is not None:
            add_dense(writer, dense, [block.channels for block in view.blocks], widths[2])
        vocabulary.write(writer)
        add_seal(writer)
        try:
            _write_tensors(writer, entries, row)
        finally:
            writer.close()
        if row.quantized_by_llama:
            quantize(written, path, row.file_type)
        close_seal(path)
    finally:
        if written != path:
            written.unlink(missing_ok=True)
    return check_gguf(path)


def _check_architecture(config: PretrainedConfig) -> None:
    """Refuse what llama.cpp's Llama has no setting for."""
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for wrong, asked in (
        (config.model_type not in MODEL_TYPES, f"is of type {config.model_type!r}"),
        (getattr(config, "hidden_act", "silu") != "silu", f"has the activation {getattr(config, 'hidden_act', '')!r}"),
        (window is not None, f"attends to a window of {window} tokens only"),
        (rope.get("rope_type") not in _STATIC_ROPE, f"scales rotary positions as {rope}"),
        (rope.get("partial_rotary_factor", 1) != 1, "rotates a part of every head only"),
    ):
        if wrong:
            raise UnsupportedArchitecture(
                f"The model {asked}, and was to become a GGUF file",
                f"llama.cpp has layers of different widths in its Llama alone: {', '.join(MODEL_TYPES)} with SiLU, "
                f"attention to all tokens, and rotary positions of the kinds {', '.join(_STATIC_ROPE)}",
                "Export to hf, which keeps the model as it is, or to onnx",
            )


def _check_nothing_left(model: PreTrainedModel, entries: list[Entry]) -> None:
    """Refuse a model with parameters that the file has no place for."""
    taken = {id(entry.parameter) for entry in entries}
    if left := [name for name, parameter in model.named_parameters() if id(parameter) not in taken]:
        raise UnsupportedArchitecture(
            f"The model has {len(left)} tensors that llama.cpp's Llama knows nothing of, {left[0]!r} the first",
            "It would compute something else without them",
            "Export to hf, which keeps the model as it is",
        )


def _layer_widths(view: ModelView, entries: list[Entry]) -> tuple[list[int], list[int], list[int]]:
    """Query heads, key/value heads and FFN channels (as in the file) of every layer."""
    shapes = {entry.name: entry.shape for entry in entries}
    return (
        [block.heads for block in view.blocks],
        [block.groups for block in view.blocks],
        [shapes[f"blk.{block.index}.ffn_down.weight"][1] for block in view.blocks],
    )


def _add_shape(
    writer: gguf.GGUFWriter,
    view: ModelView,
    embedding: tuple[int, ...],
    widths: tuple[list[int], list[int], list[int]],
) -> None:
    config, head_dim = view.model.config, view.blocks[0].head_dim
    writer.add_vocab_size(embedding[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(embedding[1])
    writer.add_block_count(len(view.blocks))
    setters = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(setters, widths, strict=True):
        add(counts if writer.arch == "deci" else counts[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _format(entry: Entry, row: Kind) -> Any:
    """Of one tensor: float16 where a row is no whole number of blocks."""
    if len(entry.shape) == 1:
        return Format.F32
    return Format.F16 if row.matrix is Format.Q8_0 and entry.shape[-1] % BLOCK else row.matrix


def _write_tensors(writer: gguf.GGUFWriter, entries: list[Entry], row: Kind) -> None:
    for entry in entries:
        form = _format(entry, row)
        dtype = {Format.F32: np.float32, Format.F16: np.float16}.get(form, np.uint8)
        shape = entry.shape if dtype is not np.uint8 else gguf.quant_shape_to_byte_shape(entry.shape, form)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), size, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_numbers(entry, _format(entry, row)))


def _numbers(entry: Entry, form: Any) -> NDArray[Any]:
    values = entry.make().detach().float().contiguous().numpy()
    with np.errstate(over="ignore"):
        numbers: NDArray[Any] = gguf.quantize(values, form)
    if form is Format.F16 and not np.isfinite(numbers).all():
        raise ParameterError(
            f"{entry.name} was to be stored as float16, and is not finite then",
            "float16 ends at 65,504",
            "Use --type f32, or q8_0, whose blocks have a scale of their own",
        )
    return numbers
