"""Model folders: saved whole or not at all, loaded only when every tensor is what config.json says."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ffprune.core.errors import DiskFull, MissingInput, ParameterError
from ffprune.models.config_file import UNUSABLE, bad_settings, read_config, refusing, said_by
from ffprune.models.experts import gather_experts, stored_parts
from ffprune.models.families import family_of
from ffprune.models.fused import Parts
from ffprune.models.layer_config import (
    quiet_transformers,
    read_layer_config,
    settle,
    write_layer_config,
    write_shapes,
)
from ffprune.models.modeling_pruned import channels, narrow
from ffprune.models.onload import Onload
from ffprune.models.pretrained import is_ours, name_code, write_code
from ffprune.models.temporary import replacing
from ffprune.models.view import Heads, ModelView
from ffprune.models.weights import CorruptModel, fill, placement, read_object, weight_files

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model folder, whole or not at all.

    Weights (tied ones once) go to ``model.safetensors``, or to several such files and their index; what is converted or
    copied on the way is in memory one file at a time. Layers pruned to other shapes than the dense ones are listed in
    config.json under ``per_layer_config``. The model is not changed.

    Args:
        model: of a supported family, dense or pruned.
        tokenizer: saved next to it; None for none.
        path: the folder; what it held before is replaced at the very end, and stays on failure.
        dtype: number format of the weights on disk; None: that of the model's embeddings.
        max_shard_size: of a file of weights, in bytes or as ``5GB``; a larger tensor has a file of its own.

    Raises:
        DiskFull: not enough room; states both sizes.
        UnsupportedArchitecture: no family fits the model.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.dtype
    config = _present_config(model, dtype)
    tensors = _tensors(model)
    # What will be written, without its numbers.
    shapes = {name: _as_written(tensor(), dtype) for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    with _refusing_full_disk(path, sum(t.nbytes for t in shapes.values())), replacing(path) as folder:
        with quiet_transformers():
            config.save_pretrained(folder)
        for file, names in plan.filename_to_tensors.items():
            shard = {name: _compact(tensors[name]().to(shapes[name].dtype)) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            # safetensors makes its file readable by its owner only; a model is as shareable as its config.
            (folder / file).chmod((folder / "config.json").stat().st_mode)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if model.generation_config is not None:
            model.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if any(not is_ours(code) for code in getattr(config, "auto_map", {}).values()):
            # A model that runs its own code can only be loaded again with that code next to it.
            for code in Path(config._name_or_path).glob("*.py"):
                shutil.copy(code, folder)
        write_code(folder, config)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    onload: Literal["model", "block"] = "model",
    finite: bool = True,
) -> PreTrainedModel:
    """Load a dense or pruned model folder, from safetensors only.

    The model is built without weights, its layers get the shapes of ``per_layer_config``, and every tensor
    is checked against them before it is read: one tensor at a time, straight to its device.

    Args:
        path: a folder with config.json and safetensors weights, in one file or sharded.
        dtype: floating-point type of the parameters.
        device: where the whole model goes, unless ``device_map`` is given.
        device_map: ``"auto"`` spreads the model over the devices there are; or module name -> device.
        trust_remote_code: run Python code that the folder ships.
        onload: what is on the device at a time: ``"model"``, or ``"block"``, one decoder layer beside the embeddings
            and the head (:class:`ffprune.models.onload.Onload`). The other layers rest on the CPU as they are stored,
            mapped from their files: they cost no memory that the system could not take back.
        finite: refuse weights that are not finite. It reads all of them at once, also those that would stay mapped
            until they are used; the stages, which measure what they load, do without.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        ParameterError: no such device, or a device map that cannot be (:func:`ffprune.models.weights.placement`), or
            one together with ``onload="block"``.
        MissingInput: no folder, config or weights.
        UnsafeFile: pickled weights only, or code in the folder that was not trusted.
        UnsupportedArchitecture: no family fits.
        CorruptModel: config or weights are damaged or contradict each other, or weights are not finite.
    """
    if onload == "block" and device_map is not None:
        raise ParameterError(
            f"A model was to be spread by the device map {device_map!r}, with one block on the device at a time",
            "Blocks either have devices of their own or take turns on one",
            "Leave out the device map, or set onload to 'model'",
        )
    path = Path(path)
    model = _without_weights(path, dtype, trust_remote_code)
    files = weight_files(path)
    with quiet_transformers():
        family, devices = family_of(model.config), placement(model, device, device_map)
        fill(model, files, dtype, devices, family, family.layers if onload == "block" else None, finite)
        if onload == "block":
            # Modules take attributes of any kind; their stubs know tensors and modules alone.
            model.onload = Onload(model, [block.layer for block in ModelView(model).blocks])  # type: ignore[assignment]
    if (settings := path / "generation_config.json").exists():
        read_object(settings)  # transformers tells a file that is no JSON from none at all by its text alone
        with refusing(settings):
            model.generation_config = GenerationConfig.from_pretrained(path)
    if len(set(devices.values())) > 1:
        import accelerate  # type: ignore[import-untyped]  # slow to import, rarely needed

        accelerate.dispatch_model(model, devices)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def read_view(path: str | Path, heads: Heads = "group") -> ModelView:
    """A model folder by its config alone: shapes on the meta device, no weight is read.

    Raises:
        MissingInput, UnsupportedArchitecture, CorruptModel: see :func:`load_model`.
    """
    return ModelView(_without_weights(Path(path), torch.float32, trust_remote_code=False), heads)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        MissingInput: the folder has no tokenizer.
        CorruptModel: one of its files is damaged, or they make no tokenizer.
    """
    path = Path(path)
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise MissingInput(
            f"A tokenizer was asked for from {path}",
            "There is neither tokenizer.json nor tokenizer_config.json",
            "Copy the tokenizer files of the original model into the folder",
        )
    try:
        # Not left open: transformers would ask at the terminal whether to run code that the folder ships.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # The library tokenizers raises the bare class, and transformers an OSError where files are missing.
        if type(error) is Exception or isinstance(error, (*UNUSABLE, OSError)):
            raise _bad_tokenizer(path, error) from error
        raise
    return tokenizer


def _bad_tokenizer(path: Path, error: Exception) -> CorruptModel:
    """The refusal of a folder's tokenizer: of the file that is no JSON object, if it is that."""
    files = [path / name for name in _TOKENIZER_FILES if (path / name).is_file()]
    for file in files:
        try:
            read_object(file)
        except CorruptModel as refusal:
            return refusal
    return CorruptModel(
        f"The tokenizer in {path} ({', '.join(file.name for file in files)}) cannot be used: {said_by(error)}",
        "It must be one that transformers loads as data, without code of its own",
        "Fetch the folder again, or copy the tokenizer files of the original model into it",
    )


def stored_dtype(path: str | Path) -> torch.dtype:
    """The number format that a model folder is stored in, as its config says (float32 where it does not).

    Raises:
        MissingInput, CorruptModel: no folder with a readable config.
    """
    dtype = read_config(Path(path), trust_remote_code=False).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _without_weights(path: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder on the meta device, every layer in its own shape."""
    config, file = read_config(path, trust_remote_code), path / "config.json"
    with quiet_transformers():
        family = family_of(config)
        with refusing(file):
            shapes = read_layer_config(config, family)
        # transformers builds all layers from the global values, which a heterogeneous config hides.
        config.per_layer_config = None
        setattr(config, family.ffn_width, channels(config, family.ffn_width))  # GPT-2 may leave it unsaid
        with refusing(file), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # of a library
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
        try:
            narrow(model, shapes, family.layout)
        except ValueError as error:
            raise bad_settings(file, str(error)) from error
        for layer in model.get_submodule(family.layers).children():
            gather_experts(layer, family)  # before there are weights, which would be copied
        write_shapes(model.config, family, shapes)
    return model


def _present_config(model: PreTrainedModel, dtype: torch.dtype) -> PretrainedConfig:
    """A copy of the model's config with its present shapes."""
    config = copy.deepcopy(model.config)
    with quiet_transformers():
        write_layer_config(config, ModelView(model))
        settle(config, family_of(config))
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    name_code(config)
    return config


def _tensors(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """What goes to disk, made when asked for: parameters and persistent buffers, tied ones once, by the family's names.

    Only what is put together from parts is a copy.
    """
    seen: set[int] = set()
    tensors: dict[str, Callable[[], Tensor]] = {}
    fused = {path: module for path, module in model.named_modules() if isinstance(module, Parts)}
    family = family_of(model.config)
    names, experts = family.stored_as, family.experts
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, _, kind = name.rpartition(".")
        whole = owner.rpartition(".")[0]
        if whole in fused:
            tensors[f"{whole}.{kind}"] = partial(fused[whole].joined, kind)
        elif experts is not None:
            tensors |= {
                key: part.detach for key, part in stored_parts(name, tensor, model.get_submodule(owner), experts)
            }
        else:
            tensors[names.get(name, name)] = tensor.detach
    return tensors


def _as_written(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape and number format of a tensor in a file, without its numbers."""
    return torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")


def _compact(tensor: Tensor) -> Tensor:
    """Contiguous and alone in its storage, as safetensors wants it: prefix views share a larger one."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _refusing_full_disk(path: Path, needed: int) -> Iterator[None]:
    def full() -> DiskFull:
        free = shutil.disk_usage(path.parent).free
        return DiskFull(
            f"Saving a model of {needed / 1e6:.1f} MB to {path}",
            f"That disk has {free / 1e6:.1f} MB free; what {path.name} held before is untouched",
            "Free some space or choose an output folder on another disk",
        )

    if shutil.disk_usage(path.parent).free < needed:
        raise full()
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers report the system's error under types of their own, as text only.
        if "No space left" in str(error):
            raise full() from error
        raise
