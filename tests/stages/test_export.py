"""The command: where it writes, what stays when it fails, what it knows of a project's models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffprune import cli
from ffprune.core.errors import FfpruneError, MissingInput, ParameterError, UnsupportedArchitecture
from ffprune.export.table import FORMATS
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.weights import CorruptModel
from ffprune.stages.export import export_model
from tests.export.conftest import UNEVEN, build, byte_tokenizer
from tests.tiny import character_tokenizer, mixtral, spread


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(build(widths=UNEVEN), byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_the_command(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ffprune", "export", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "m.gguf: one file for llama.cpp, 0.1 MB" in shown
    assert "29 F16" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"model", "m.gguf"}


def test_help_names_all_formats_and_types() -> None:
    help = str(cli.export.__annotations__)
    for name, row in FORMATS.items():
        assert name in help
        assert all(kind in help for kind in row.kinds)


def test_what_is_there_is_replaced_only_when_told(folder, tmp_path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(ParameterError, match="--force"):
        export_model(folder, out, "gguf")
    assert out.read_text() == "mine"
    export_model(folder, out, "gguf", force=True)
    before = out.read_bytes()
    assert before.startswith(b"GGUF")
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptModel):
        export_model(folder, out, "gguf", force=True)
    assert out.read_bytes() == before


def test_a_folder_is_replaced_whole(folder, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_model(folder, out, "hf")  # an empty folder is in nobody's way
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ParameterError, match="not empty"):
        export_model(folder, out, "hf")
    assert (out / "mine.txt").exists()
    export_model(folder, out, "hf", force=True)
    assert not (out / "mine.txt").exists()
    assert (out / "policy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_place_that_is_in_the_way_is_refused(to, folder, tmp_path) -> None:
    for out in (folder, folder / "inside", tmp_path):
        with pytest.raises(ParameterError, match="lies inside the other"):
            export_model(folder, out, to, force=True)
    if FORMATS[to].folder:
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").mkdir()
    with pytest.raises(ParameterError, match="There is a f"):
        export_model(folder, tmp_path / "out", to, force=True)


def test_unknown_formats_and_types_are_refused(folder, tmp_path) -> None:
    with pytest.raises(ParameterError, match="Known names: .*gguf"):
        export_model(folder, tmp_path / "out", "safetensors")
    with pytest.raises(ParameterError, match="It has f16, f32, q8_0, q4_k_m"):
        export_model(folder, tmp_path / "out", "gguf", "q3")


NO_LIBRARY = "cannot be imported|lost its sparse formats"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when compressed-tensors is imported
@pytest.mark.parametrize("to", list(FORMATS))
def test_a_folder_that_does_not_load_leaves_nothing_behind(to, folder, tmp_path) -> None:
    with pytest.raises(MissingInput, match=f"no such folder|{NO_LIBRARY}"):
        export_model(tmp_path / "nowhere", tmp_path / "out", to)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises((CorruptModel, MissingInput), match=f"truncated|{NO_LIBRARY}"):
        export_model(folder, tmp_path / "out", to)
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.adapter.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises((CorruptModel, MissingInput), match=f"a tensor 'model.layers.0.adapter.weight'|{NO_LIBRARY}"):
        export_model(folder, tmp_path / "out", to)
    file.write_bytes(whole)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(FfpruneError, match=f"lack|{NO_LIBRARY}"):
        export_model(folder, tmp_path / "out", to)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("to", list(FORMATS))
def test_mixtures_of_experts_go_to_hf_alone(to, tmp_path) -> None:
    save_model(spread(mixtral()), character_tokenizer(), tmp_path / "model")
    if to == "hf":
        export_model(tmp_path / "model", tmp_path / "out", to)
        assert load_model(tmp_path / "out").config.model_type == "mixtral"
        return
    with pytest.raises(UnsupportedArchitecture, match=f"type 'mixtral' was to be exported to {to}.*Export to hf"):
        export_model(tmp_path / "model", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def spoil_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be used: it holds []"),
    "tokenizer": (lambda folder: os.truncate(folder / "tokenizer.json", 200), "tokenizer.json cannot be used"),
    "generation": (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json cannot"),
    "weight": (spoil_weight, "'model.norm.weight' with numbers that are NaN"),
    "no folder": (lambda folder: (shutil.rmtree(folder), folder.touch()), "It is a file, and a model is a folder"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("to", ["hf", "gguf", "inspect"])
def test_the_command_refuses_a_damaged_folder_in_one_line(damage, to, folder, tmp_path, monkeypatch, capsys) -> None:
    spoil, said = DAMAGES[damage]
    spoil(folder)
    words = ["inspect", str(folder)] if to == "inspect" else ["export", str(folder), str(tmp_path / "out"), "--to", to]
    monkeypatch.setattr(sys, "argv", ["ffprune", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    if (damage, to) == ("tokenizer", "inspect"):  # which reads none
        assert caught.value.code == 0
        return
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert shown.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_folder_without_heads_in_a_layer_is_refused(folder, tmp_path) -> None:
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"num_key_value_heads": 1', '"num_key_value_heads": 0'))
    assert config.read_text() != before
    with pytest.raises(CorruptModel, match="num_key_value_heads is 0"):
        export_model(folder, tmp_path / "out", "gguf")
