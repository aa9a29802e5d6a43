"""The formats that a model folder can be exported to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffprune.core.units import Allocation
from ffprune.export.provenance import Provenance


@dataclass(frozen=True)
class Request:
    """What a format is asked to write.

    Attributes:
        folder: the model folder.
        out: the file to write, or an empty folder to fill.
        kind: one of the format's kinds; "" where it has none.
        provenance: what is known of the model.
        draw: a picture (PNG) of what is left of every unit, for a model card.
    """

    folder: Path
    out: Path
    kind: str
    provenance: Provenance
    draw: Callable[[Allocation], bytes]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        about: one line for people.
        folder: whether it is a folder; else one file.
        write: writes it; returns remarks, each a line for people. Raises an FfpruneError for what it cannot write.
        kinds: what ``--type`` may be, the first if nothing is said; empty: the format has one kind only.
        experts: whether it has a place for mixtures of experts.
    """

    about: str
    folder: bool
    write: Callable[[Request], list[str]]
    kinds: tuple[str, ...] = ()
    experts: bool = False


# What writes a format is imported when it is asked for: some need libraries that may not be there.


def _huggingface(request: Request) -> list[str]:
    from ffprune.export.huggingface import write_huggingface

    write_huggingface(request.folder, request.out, request.provenance, request.draw)
    return [f"license of the source model: {request.provenance.license or 'unknown'}"]


def _gguf(request: Request) -> list[str]:
    from ffprune.export.gguf import write_gguf
    from ffprune.models.checkpoint import load_model, load_tokenizer, stored_dtype

    model, tokenizer = load_model(request.folder, stored_dtype(request.folder)), load_tokenizer(request.folder)
    known = request.provenance
    written = write_gguf(model, tokenizer, request.out, request.kind, known.name, known.license)
    return [f"tensors: {', '.join(f'{count} {name}' for name, count in written.formats.items())}"]


def _compressed(request: Request) -> list[str]:
    from ffprune.export.compressed_tensors import write_compressed

    name, share = write_compressed(request.folder, request.out)
    return [f"{name}: {share:.1%} of the bytes of dense weights; read by compressed-tensors up to 0.14"]


def _onnx(request: Request) -> list[str]:
    from ffprune.export.onnx import write_onnx

    return [f"largest difference from torch's logits: {write_onnx(request.folder, request.out):.2g}"]


#: Name -> format.
FORMATS: dict[str, Format] = {
    "hf": Format("a folder for transformers, with a model card", folder=True, write=_huggingface, experts=True),
    "gguf": Format("one file for llama.cpp", folder=False, write=_gguf, kinds=("f16", "f32", "q8_0", "q4_k_m")),
    "onnx": Format("a folder for onnxruntime", folder=True, write=_onnx),
    "compressed-tensors": Format("a folder with sparse weights packed", folder=True, write=_compressed),
}
