"""Packed folders, unpacked again by the library itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.core.masks import pattern_mask
from ffprune.export import compressed_tensors
from ffprune.export.compressed_tensors import write_compressed
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from tests.export.conftest import build, byte_tokenizer

# Of torch, which the library makes compile functions when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def library():
    try:
        compressed_tensors._library()
    except MissingInput as error:
        pytest.skip(str(error))


def sparse(pattern: str, roles: str = "q k v o gate up down") -> PreTrainedModel:
    """A model with 2:4 zeros in every matrix of these roles, or with 70% zeros anywhere."""
    model = build().half()
    generator = torch.Generator().manual_seed(3)
    for name, linear in ModelView(model).prunable.items():
        if name.rpartition(".")[2] in roles.split():
            scores = torch.rand(linear.weight.shape, generator=generator)
            keep = pattern_mask(scores, "2:4") if pattern == "2:4" else scores > 0.7
            linear.weight.mul_(keep)
    return model


def packed(model: PreTrainedModel, folder: Path) -> tuple[Path, str, float]:
    save_model(model, byte_tokenizer(), folder / "m")
    (folder / "out").mkdir()
    return folder / "out", *write_compressed(folder / "m", folder / "out")


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_what_is_unpacked_is_the_same_model(pattern, tokens, tmp_path, library) -> None:
    model = sparse(pattern)
    out, name, share = packed(model, tmp_path)
    assert name == compressed_tensors.FORMATS[pattern]
    assert share < 0.9
    found = dict(compressed_tensors._packer(name).decompress(str(out)))
    state = model.state_dict()
    assert set(found) == set(state) - {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(found[key], state[key]) for key in found)
    again = build().half()
    for parameter in again.parameters():
        parameter.zero_()
    again.load_state_dict(found, strict=False)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_config_says_what_is_packed(tmp_path, library) -> None:
    out, _, _ = packed(sparse("2:4", "gate up down"), tmp_path)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    assert said["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert said["sparsity_config"]["ignore"][:2] == ["lm_head", "model.layers.0.self_attn.k_proj"]
    assert len(said["sparsity_config"]["ignore"]) == 1 + 4 * 4
    assert said["sparsity_config"]["global_sparsity"] == pytest.approx(2880 / 19584, abs=1e-4)
    # ffprune itself reads what is not packed, and says so.
    with pytest.raises(CorruptModel, match="without quantisation"):
        load_model(out)


def test_one_matrix_that_is_not_2_of_4_makes_all_unstructured(tmp_path, library) -> None:
    model = sparse("2:4")
    model.model.layers[2].mlp.up_proj.weight[0, :3] = 1
    assert packed(model, tmp_path)[1] == "sparse-bitmask"


def test_a_folder_without_zeros_is_refused(tmp_path, library) -> None:
    with pytest.raises(ParameterError, match="0.0% of its sparsest matrix"):
        packed(build(), tmp_path)


def test_what_is_not_the_same_when_unpacked_is_found_out(tmp_path, library, monkeypatch) -> None:
    monkeypatch.setattr(compressed_tensors, "_two_in_four", lambda weight: True)
    with pytest.raises(CorruptModel, match="another one when it is unpacked"):
        packed(sparse("unstructured"), tmp_path)


def test_a_library_without_sparse_formats_is_refused(tmp_path, monkeypatch) -> None:
    newer = SimpleNamespace(
        BaseCompressor=SimpleNamespace(registered_names=lambda: ["dense", "pack-quantized"]), __version__="0.20.0"
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: newer)
    with pytest.raises(
        MissingInput, match=r"tensors 0.20.0 is installed.*lost its sparse formats in 0.15.*Export to hf"
    ):
        write_compressed(tmp_path, tmp_path)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingInput, match="no compressed-tensors is installed"):
        write_compressed(tmp_path, tmp_path)
