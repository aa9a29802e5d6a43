"""Sparse weights as compressed-tensors stores them: the values that are not zero, and a bit for every weight.

``sparse-24-bitmask`` where every matrix with zeros has at most two values in four, else ``sparse-bitmask``. The library
itself packs and unpacks. It did so up to 0.14 only, and transformers 5 reads neither format: what reads such folders is
compressed-tensors up to 0.14.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model, stored_dtype
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel, weight_bytes, weight_files

FORMATS = {"2:4": "sparse-24-bitmask", "unstructured": "sparse-bitmask"}


def write_compressed(folder: Path, out: Path) -> tuple[str, float]:
    """Write a folder whose sparse matrices are packed; unpacked again, each is compared with the original.

    Args:
        folder: the model folder, with matrices that are zero in part.
        out: an empty folder.

    Returns:
        The format, and bytes of the weights over those of the folder.

    Raises:
        MissingInput: compressed-tensors is not there, or one that has no sparse formats any more.
        ParameterError: no matrix would become smaller.
        CorruptModel: what was written is not what was to be.
        FfpruneError: the folder does not load; see :func:`ffprune.models.checkpoint.load_model`.
    """
    _library()
    model = load_model(folder, stored_dtype(folder))
    linears = ModelView(model).prunable.values()
    names = {id(module): name for name, module in model.named_modules()}
    dense = {names[id(linear)]: linear.weight.detach() for linear in linears}
    pattern, sparse = _chosen(dense)
    packer = _packer(FORMATS[pattern])
    save_model(model, load_tokenizer(folder), out)
    before = weight_bytes(out)
    tensors = dict(_packed(out, sparse, packer))
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    save_torch_state_dict(tensors, out)
    del tensors
    _check(out, sparse, packer)
    _write_config(out / "config.json", pattern, sparse, dense)
    return FORMATS[pattern], weight_bytes(out) / before


def _library() -> Any:
    """The library, if it is one that packs sparse weights."""
    try:
        library = importlib.import_module("compressed_tensors")
        found, formats = f"compressed-tensors {library.__version__}", set(library.BaseCompressor.registered_names())
    except ImportError:
        found, formats = "no compressed-tensors", set()
    if not formats.issuperset(FORMATS.values()):
        raise MissingInput(
            f"Sparse weights were to be packed, and {found} is installed",
            "compressed-tensors lost its sparse formats in 0.15; the last version with them asks for transformers 4, "
            "so it is no extra of ffprune, and packs all the same",
            "Export to hf, which keeps the zeros in dense safetensors that every program reads, or: "
            "pip install --no-deps compressed-tensors==0.14.0.1 loguru",
        )
    return library


def _packer(name: str) -> Any:
    config = importlib.import_module("compressed_tensors.config").SparsityCompressionConfig
    return _library().BaseCompressor.load_from_registry(name, config=config.load_from_registry(name))


def _chosen(dense: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The pattern, and the matrices that become smaller in its format."""
    # A bit a weight, and for the unstructured format an offset of 64 bits a row.
    zeros = {name: float((weight == 0).float().mean()) for name, weight in dense.items()}
    gain = {name: 1 / (8 * weight.element_size()) + 8 / weight[0].nbytes for name, weight in dense.items()}
    sparse = {name: weight for name, weight in dense.items() if zeros[name] > gain[name]}
    if not sparse:
        raise ParameterError(
            f"The folder was to be packed, and {max(zeros.values()):.1%} of its sparsest matrix is zero",
            "Packing costs a bit a weight: matrices without zeros become larger",
            "Export to hf, or prune single weights first (compressor `unstructured` of the section methods)",
        )
    fits = all(weight.shape[1] % 4 == 0 and _two_in_four(weight) for weight in sparse.values())
    return "2:4" if fits else "unstructured", sparse


def _two_in_four(weight: Tensor) -> bool:
    return int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def _packed(folder: Path, sparse: Mapping[str, Tensor], packer: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder, those of sparse matrices packed."""
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            packed = packer.compress({name: tensor}, compression_targets=set(sparse), show_progress=False)
            yield from packed.items()


def _check(out: Path, sparse: Mapping[str, Tensor], packer: Any) -> None:
    """Unpack what was written."""
    found = set()
    for name, tensor in packer.decompress(str(out)):
        module = name.removesuffix(".weight")
        if module in sparse:
            found.add(module)
            if not torch.equal(tensor, sparse[module]):
                raise CorruptModel(f"{name} is another one when it is unpacked", "It must be the same", "Export to hf")
    if missing := set(sparse) - found:
        raise CorruptModel(f"{min(missing)} was not written", "Every sparse matrix must be", "Export to hf")


def _write_config(file: Path, pattern: str, sparse: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Say in config.json how the weights are packed."""
    weights = sum(weight.numel() for weight in dense.values())
    zeros = sum(int((weight == 0).sum()) for weight in dense.values())
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": _library().__version__,
        "sparsity_config": {
            "format": FORMATS[pattern],
            "sparsity_structure": pattern,
            "global_sparsity": zeros / weights,
            "targets": ["Linear"],
            "ignore": sorted({*dense, "lm_head"} - set(sparse)),
        },
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
