"""config.json of a model folder: read, and refused by the name of the setting that no model can be built from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from ffprune.core.errors import MissingInput, UnsafeFile
from ffprune.models import baichuan
from ffprune.models.families import FAMILIES, Family, family_named
from ffprune.models.layer_config import quiet_transformers
from ffprune.models.pretrained import is_ours
from ffprune.models.weights import CorruptModel, read_object, shown

#: What transformers and torch raise over settings that they cannot use. Catch these around a call into them alone,
#: never around code of ours, whose faults must keep their tracebacks.
UNUSABLE: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)

# Of any family; others are checked by transformers, or by the shapes of the tensors.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_layer",
)


def read_config(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model folder, as transformers knows it; of Baichuan-7B, that of the Llama that it is.

    Raises:
        MissingInput, UnsafeFile, UnsupportedArchitecture, CorruptModel: see
            :func:`ffprune.models.checkpoint.load_model`.
    """
    file = path / "config.json"
    if not file.is_file():
        raise MissingInput(
            f"A model was asked for from {path}",
            _what_is_there(path),
            "Give a folder with config.json and *.safetensors, as save_pretrained writes it",
        )
    raw = read_object(file)
    if raw.get("model_type") == baichuan.MODEL_TYPE:
        _check_settings(file, raw, FAMILIES["llama"])
        with refusing(file):
            return baichuan.llama_config(raw)
    _check_settings(file, raw, family_named(str(raw.get("model_type")), raw))
    foreign = {key for key, value in raw.get("auto_map", {}).items() if not is_ours(value)}
    if {"AutoConfig", "AutoModelForCausalLM"} & foreign and not trust_remote_code:
        raise UnsafeFile(
            f"The model in {path} runs Python code of its own ({raw['auto_map']})",
            "ffprune runs no code from a model folder unless told to",
            "Read that code, then set trust_remote_code to true, or choose another model",
        )
    with refusing(file), quiet_transformers():
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Turn what a library says of a file's settings (:data:`UNUSABLE`) into a refusal of that file.

    Raises:
        CorruptModel: in place of that error.
    """
    try:
        yield
    except UNUSABLE as error:
        raise bad_settings(file, said_by(error)) from error


def bad_settings(file: Path, wrong: str) -> CorruptModel:
    """The refusal of a file with settings.

    Args:
        file: in a model folder.
        wrong: what is wrong, with the name of the setting.
    """
    return CorruptModel(
        f"{file} cannot be used: {wrong}",
        "It must be JSON with settings that transformers knows and can use",
        "Correct it, or fetch or write the folder again",
    )


def said_by(error: Exception) -> str:
    """An error as one line; by its type as well where its text alone says little, as of a KeyError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: {text}"


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "There is no config.json"
    return "It is a file, and a model is a folder" if path.exists() else "There is no such folder"


def _check_settings(file: Path, settings: Mapping[str, Any], family: Family) -> None:
    """Refuse what transformers and torch would take, and then break on somewhere far from its name."""
    widths = {family.heads: 1, family.kv_heads: 1, family.ffn_width: 0}
    for name, least in {**dict.fromkeys(_SIZES, 1), **widths}.items():
        if settings.get(name) is not None:  # null: the family's own
            _check_size(file, name, settings[name], least)
    for name in ("dtype", "torch_dtype"):
        if settings.get(name) is not None and not _is_float(settings[name]):
            raise bad_settings(file, f"{name} is {shown(settings[name])}, and must name a floating-point type of torch")
    _check_object(file, "auto_map", settings.get("auto_map", {}))
    layers = settings.get("per_layer_config")
    for layer, own in _check_object(file, "per_layer_config", {} if layers is None else layers).items():
        of = f"per_layer_config of layer {layer}"
        for name, value in _check_object(file, of, own).items():
            if name not in widths:  # it would be read and left out: another model than the file says
                raise bad_settings(file, f"{of}: {name} is set, and layers may differ in {', '.join(widths)} alone")
            _check_size(file, f"{of}: {name}", value, widths[name])


def _check_size(file: Path, name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:  # True is an int too
        raise bad_settings(file, f"{name} is {shown(value)}, and must be a whole number of at least {least}")


def _check_object(file: Path, name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise bad_settings(file, f"{name} is {shown(value)}, and must be a JSON object")
    return value


def _is_float(name: object) -> bool:
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return isinstance(found, torch.dtype) and found.is_floating_point
