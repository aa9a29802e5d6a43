"""ONNX files, held against torch by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PretrainedConfig

from ffprune.core.errors import MissingInput
from ffprune.export import onnx as export
from ffprune.export.extras import needed
from ffprune.export.onnx import OnnxDiffers, write_onnx
from ffprune.models.checkpoint import save_model
from ffprune.models.families import FAMILIES
from ffprune.models.pretrained import CODE_FILE
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from tests.export.conftest import UNEVEN, VOCAB, build, byte_tokenizer
from tests.models.conftest import CONFIGS
from tests.models.conftest import build as build_family

#: A configuration of every family without experts; torch needs 3 to 8 s for each.
FAMILY_CASES = {
    row.model_type: next(case for case, make in CONFIGS.items() if make().model_type == row.model_type)
    for row in FAMILIES.values()
    if row.experts is None and row.model_type != "llama"  # which `written` has
}


@pytest.fixture(scope="module")
def libraries() -> None:
    try:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            needed(library, "onnx")
    except MissingInput as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def written(libraries, tmp_path_factory) -> Path:
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


def two_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Two layers can differ, and take two thirds of the time of three."""
    for name in ("layer_types", "no_rope_layers"):
        if hasattr(config, name):
            setattr(config, name, getattr(config, name)[:2])
    config.num_hidden_layers = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_family_is_exported(libraries, family, tmp_path, monkeypatch) -> None:
    """With layers of different widths; what it computes is compared with torch on the way."""
    case = FAMILY_CASES[family]
    config = two_layers(CONFIGS[case]())
    monkeypatch.setitem(CONFIGS, case, lambda: config)
    model = build_family(case)
    view = ModelView(model)
    slice_model(view, [torch.arange(1 + (7 * i + 3) % unit.granules) for i, unit in enumerate(view.units)])
    save_model(model, byte_tokenizer(), tmp_path / "m")
    (tmp_path / "out").mkdir()
    assert 0 <= write_onnx(tmp_path / "m", tmp_path / "out") < 1e-3


@pytest.mark.slow
def test_no_code_is_named_that_is_not_there(written) -> None:
    assert "auto_map" in json.loads((written.parent / "m/config.json").read_text())
    config = json.loads((written / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" in config
    assert not (written / CODE_FILE).exists()


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
