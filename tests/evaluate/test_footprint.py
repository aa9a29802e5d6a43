"""Sizes, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffprune.core.errors import MissingInput
from ffprune.evaluate.footprint import Footprint, footprint, safetensors_bytes
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from tests.tiny import VOCAB, llama, opt

# hidden 16, FFN 24, 4 heads of 4, 2 key/value heads, 2 layers
LLAMA_LAYER = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24
OPT_LAYER = 4 * 16 * 16 + 2 * 16 * 24
NORMS = 2 * 2 * 16 + 16


@pytest.mark.parametrize("tied", [True, False])
def test_llama_to_the_last_parameter(tied: bool) -> None:
    assert footprint(llama(tied)) == Footprint(
        prunable=2 * LLAMA_LAYER,
        whole=2 * LLAMA_LAYER + NORMS + VOCAB * 16 * (1 if tied else 2),
        bytes_on_disk=None,
        kv_cache_bytes_per_token=2 * 2 * 8 * 4,
        macs_per_token=2 * LLAMA_LAYER + VOCAB * 16,
    )


def test_opt_to_the_last_parameter() -> None:
    biases = 2 * (4 * 16 + 24 + 16)
    norms = (2 * 2 + 1) * 2 * 16
    positions = (128 + 2) * 16
    assert footprint(opt()) == Footprint(
        prunable=2 * OPT_LAYER,
        whole=2 * OPT_LAYER + biases + norms + positions + VOCAB * 16,
        bytes_on_disk=None,
        kv_cache_bytes_per_token=2 * 2 * 16 * 4,
        macs_per_token=2 * OPT_LAYER + VOCAB * 16,
    )


def test_pruned_model() -> None:
    model = llama()
    dense = footprint(model)
    view = ModelView(model)
    kept = [torch.arange(unit.granules) for unit in view.units]
    kept[0], kept[3] = torch.tensor([1]), torch.arange(20)
    slice_model(view, kept)
    removed = view.units[0].params_per_granule + 4 * view.units[3].params_per_granule
    pruned = footprint(model)
    assert dense.prunable - pruned.prunable == removed
    assert dense.whole - pruned.whole == removed
    assert dense.macs_per_token - pruned.macs_per_token == removed
    assert pruned.kv_cache_bytes_per_token == (4 + 8) * 2 * 4


def test_cache_follows_the_dtype() -> None:
    assert footprint(llama().to(torch.bfloat16)).kv_cache_bytes_per_token == 2 * 2 * 8 * 2


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert footprint(model, tmp_path).bytes_on_disk == on_disk
    (tmp_path / "second.safetensors").write_bytes(b"12345")
    assert safetensors_bytes(tmp_path) == on_disk + 5


def test_no_model_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"no \*\.safetensors"):
        safetensors_bytes(tmp_path)
