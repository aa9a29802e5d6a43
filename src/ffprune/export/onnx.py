"""ONNX by torch's own exporter: token identifiers and mask to logits, any batch and any length, without a cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ffprune.core.errors import FfpruneError
from ffprune.export.extras import needed
from ffprune.models.checkpoint import load_model, load_tokenizer
from ffprune.models.layer_config import quiet, quiet_transformers

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of a logit from torch's, as a share of the largest logit."""


class OnnxDiffers(FfpruneError):
    """An ONNX file that could not be made, or computes something else than the model."""


class _Logits(nn.Module):
    """A model as a function of two tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write_onnx(folder: Path, out: Path) -> float:
    """Write ``model.onnx`` in float32 with its weights beside it, and config and tokenizer; run it against torch.

    Its inputs are ``input_ids`` and ``attention_mask``, int64 ``[batch, sequence]``; its output ``logits``, float32
    ``[batch, sequence, vocabulary]``.

    Args:
        folder: the model folder.
        out: an empty folder.

    Returns:
        The largest difference of a logit from torch's, on sequences of another batch and length than were traced.

    Raises:
        MissingInput: onnx, onnxscript or onnxruntime is not there.
        OnnxDiffers: torch cannot export the model, or onnxruntime computes something else.
        FfpruneError: the folder does not load; see :func:`ffprune.models.checkpoint.load_model`.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        needed(library, "onnx")
    model = load_model(folder)
    load_tokenizer(folder).save_pretrained(out)
    _described(model.config).save_pretrained(out)
    traced = _inputs(model, batch=2, length=7)
    names = dict.fromkeys(("input_ids", "attention_mask"))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        with _quiet():
            torch.onnx.export(
                _Logits(model).eval(),
                traced,
                out / FILE,
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=dict.fromkeys(names, axes),
                dynamo=True,
                external_data=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise OnnxDiffers(
            f"torch cannot export this {type(model).__name__} to ONNX: {str(error).splitlines()[0]}",
            "Models are exported by torch.onnx.export, as one function of identifiers and mask",
            "Export to hf, or try another version of torch",
        ) from error
    return _difference(model, out / FILE)


def _described(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without the name of code that would load weights for torch: neither goes into the folder."""
    config = copy.deepcopy(config)
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def _inputs(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, the last row padded on the left."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, : length // 2] = 0
    return tokens, mask


def _difference(model: PreTrainedModel, file: Path) -> float:
    """Largest difference from torch's logits, of tokens that are not padding."""
    runtime: Any = needed("onnxruntime", "onnx")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tokens, mask = _inputs(model, batch=3, length=12)
    found = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad(), quiet_transformers():
        expected = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    difference = float((torch.tensor(found)[mask.bool()] - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise OnnxDiffers(
            f"onnxruntime's logits differ by up to {difference:.3g} from torch's",
            f"They should by less than {TOLERANCE:g} of the largest, {float(expected.abs().max()):.3g}",
            "Export to hf, or try another version of torch",
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself and on libraries that are not there."""
    with quiet("torch.onnx"), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield
