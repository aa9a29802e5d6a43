"""ONNX files, held against torch by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ffprune.core.errors import MissingInput
from ffprune.export import onnx as export
from ffprune.export.extras import needed
from ffprune.export.onnx import OnnxDiffers, write_onnx
from ffprune.models.checkpoint import save_model
from tests.export.conftest import UNEVEN, VOCAB, build, byte_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    try:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            needed(library, "onnx")
    except MissingInput as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("onnx")
    save_model(build(widths=UNEVEN), byte_tokenizer(), folder / "m")
    (folder / "out").mkdir()
    assert write_onnx(folder / "m", folder / "out") < 1e-4
    return folder / "out"


@pytest.mark.slow
def test_onnxruntime_agrees_in_any_batch_and_length(written) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(written / "model.onnx"), providers=["CPUExecutionProvider"])
    model = build(widths=UNEVEN)
    for batch, length in ((1, 1), (2, 7), (1, 64), (5, 13)):
        tokens = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(tokens)
        mask[0, : length // 3] = 0
        found = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0]
        expected = model(tokens, attention_mask=mask).logits
        assert found.shape == (batch, length, VOCAB)
        assert np.abs(found - expected.numpy())[mask.bool().numpy()].max() < 1e-4


@pytest.mark.slow
def test_the_tokenizer_comes_along(written) -> None:
    assert AutoTokenizer.from_pretrained(written)("the cat")["input_ids"] == byte_tokenizer()("the cat")["input_ids"]
    assert {file.name for file in written.iterdir()} >= {"model.onnx", "model.onnx.data", "config.json"}


@pytest.mark.slow
def test_another_model_is_found_out(written) -> None:
    other = build(widths=UNEVEN)
    other.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(OnnxDiffers, match="logits differ by up to"):
        export._difference(other, written / "model.onnx")


def test_without_the_libraries_it_is_refused(tmp_path, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingInput, match=r"the extra 'onnx'. pip install 'ffprune\[onnx\]'"):
        write_onnx(tmp_path, tmp_path)
