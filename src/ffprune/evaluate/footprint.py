"""How big a model is: parameters, bytes on disk, KV cache and multiplications per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ffprune.core.errors import MissingInput
from ffprune.models.experts import ExpertLinear
from ffprune.models.surgery import param_count
from ffprune.models.view import ModelView


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model (METHODS 1 and 8).

    Attributes:
        prunable: weights of the decoder layers' linear projections, as they are now.
        whole: all parameters; weights shared by two modules (tied embeddings) count once.
        bytes_on_disk: bytes of the folder's safetensors files; None for a model without a folder.
        kv_cache_bytes_per_token: bytes that keys and values of one token take in all layers, in the
            model's dtype.
        macs_per_token: multiply-accumulates of all linear maps, LM head included, for one token, which goes through a
            few experts; the attention scores, whose cost depends on the context, are not counted.
    """

    prunable: int
    whole: int
    bytes_on_disk: int | None
    kv_cache_bytes_per_token: int
    macs_per_token: int


def footprint(model: PreTrainedModel, folder: Path | None = None) -> Footprint:
    """Measure a model.

    Args:
        model: a model of a supported family, dense or pruned.
        folder: where it is saved, if it is.

    Returns:
        Its sizes.

    Raises:
        UnsupportedArchitecture: no family fits.
        MissingInput: the folder has no safetensors file.
    """
    view = ModelView(model)
    cached = sum(linear.out_features for b in view.blocks for linear in (b.linears["k"], b.linears["v"]))
    element = view.blocks[0].linears["k"].weight.element_size()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    macs = sum(linear.macs if isinstance(linear, ExpertLinear) else linear.weight.numel() for linear in linears)
    return Footprint(
        prunable=view.prunable_params,
        whole=param_count(model),
        bytes_on_disk=None if folder is None else safetensors_bytes(folder),
        kv_cache_bytes_per_token=cached * element,
        macs_per_token=macs + sum(block.router_params for block in view.blocks),
    )


def safetensors_bytes(folder: Path) -> int:
    """Bytes of all safetensors files directly in a folder.

    Args:
        folder: a saved model.

    Returns:
        The sum of the files' sizes.

    Raises:
        MissingInput: no folder there, or none of its files is a safetensors file.
    """
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    if not sizes:
        raise MissingInput(
            f"Asked for the size of the model in {folder}",
            "There is no *.safetensors file",
            "Give the folder of a saved model, or run the stage that writes it",
        )
    return sum(sizes)
