"""Baichuan-7B as the Llama that it is: its config translated, q, k and v read out of W_pack, none of its code run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

from transformers import LlamaConfig

from ffprune.core.errors import UnsupportedArchitecture

MODEL_TYPE = "baichuan"
_ARCHITECTURE = "BaiChuanForCausalLM"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHARED = (
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_DEFAULTS = {"max_position_embeddings": 4096, "pad_token_id": 0, "tie_word_embeddings": False}
_PACKED = "self_attn.W_pack.weight"


def is_baichuan(folder: Path) -> bool:
    """Whether a model folder says that it holds a Baichuan."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE


def llama_config(settings: Mapping[str, Any]) -> LlamaConfig:
    """The config of the Llama that computes what a Baichuan-7B does.

    Args:
        settings: its config.json.

    Raises:
        UnsupportedArchitecture: another model of this type: larger ones have ALiBi in place of rotary embeddings, and
            Baichuan 2 normalises the rows of its head.
        KeyError: a size is not there.
    """
    if settings.get("architectures") != [_ARCHITECTURE]:
        raise UnsupportedArchitecture(
            f"The model is of type {MODEL_TYPE!r} with architectures {settings.get('architectures')}",
            f"Only Baichuan-7B ({_ARCHITECTURE}) is a Llama under another name; Baichuan-13B has ALiBi, and Baichuan 2 "
            "a head whose rows are normalised",
            "Choose Baichuan-7B or a model of a supported type",
        )
    shared = {name: settings[name] for name in _SHARED if name in settings}
    return LlamaConfig(
        **{name: settings[name] for name in _SIZES},
        **{**_DEFAULTS, **shared},
        architectures=["LlamaForCausalLM"],
        dtype=settings.get("dtype") or settings.get("torch_dtype"),
    )


class Part(NamedTuple):
    """One of Llama's tensors in a tensor of a file.

    Attributes:
        name: as Llama calls it.
        rows: where it is.
        shape: its own.
    """

    name: str
    rows: slice | EllipsisType
    shape: list[int]


def unpacked(name: str, shape: list[int]) -> list[Part]:
    """Llama's tensors in one of a file: q, k and v in W_pack, and any other tensor as it is.

    Args:
        name: in the file.
        shape: there.
    """
    if not name.endswith(_PACKED):
        return [Part(name, ..., shape)]
    prefix, rows = name.removesuffix("W_pack.weight"), shape[0] // 3
    return [
        Part(f"{prefix}{role}_proj.weight", slice(i * rows, (i + 1) * rows), [rows, *shape[1:]])
        for i, role in enumerate("qkv")
    ]
