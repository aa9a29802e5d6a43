"""Reading safetensors into a model that was built without weights, checking every tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffprune.core.errors import FfpruneError, MissingInput, ParameterError, UnsafeFile
from ffprune.models.baichuan import unpacked
from ffprune.models.experts import ExpertLinear, Place, place_of
from ffprune.models.families import Family


class CorruptModel(FfpruneError):
    """A model folder whose files are damaged or contradict each other."""


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder: ``model.safetensors`` or the shards its index lists.

    Raises:
        MissingInput: no weights, or a shard is not there.
        UnsafeFile: weights only as pickles.
    """
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _no_safetensors(path)
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CorruptModel(
            f"{index} cannot be used: weight_map is {shown(listed)}",
            "It must be a JSON object that names every tensor's file",
            "Fetch or write the folder again",
        )
    files = [path / Path(name).name for name in sorted(set(listed.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise MissingInput(
            f"The weights in {path} are sharded over {len(files)} files",
            f"{len(missing)} of them are not there: {', '.join(missing[:3])}",
            "Fetch the folder again, completely",
        )
    return files


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        CorruptModel: it is no JSON, or a list or another value.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _no_object(file, str(error)) from error
    if not isinstance(found, dict):
        raise _no_object(file, f"it holds {shown(found)}")
    return found


def shown(value: object) -> str:
    """The beginning of a wrong value from a JSON file, as the file has it."""
    return json.dumps(value)[:60]


def _no_object(file: Path, wrong: str) -> CorruptModel:
    return CorruptModel(
        f"{file} cannot be used: {wrong}",
        f"It must be one JSON object; it has {file.stat().st_size} bytes and may be cut short",
        "Fetch or write the folder again",
    )


def weight_bytes(path: Path) -> int:
    """Bytes of :func:`weight_files`."""
    return sum(file.stat().st_size for file in weight_files(path))


def _no_safetensors(path: Path) -> FfpruneError:
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return UnsafeFile(
            f"The weights in {path} are pickles ({', '.join(pickles[:3])}), which can run code when loaded",
            "ffprune loads safetensors only",
            "Convert the model with save_pretrained where you trust it, or fetch a safetensors revision",
        )
    return MissingInput(
        f"Weights were asked for from {path}",
        "There is neither model.safetensors nor model.safetensors.index.json",
        "Give a folder with safetensors weights",
    )


def placement(
    model: PreTrainedModel, device: str | torch.device, device_map: str | dict[str, Any] | None
) -> dict[str, torch.device]:
    """Module name -> device for a model without weights; ``""`` stands for the whole model.

    Raises:
        ParameterError: a device that is not there, or a map that leaves modules without one; modules that the map would
            leave on the disk, or on the CPU beside other devices.
    """
    if device_map is None or (isinstance(device_map, str) and device_map != "auto"):
        return {"": _device(device_map or device)}
    spread: dict[str, Any]
    if isinstance(device_map, str):
        import accelerate  # type: ignore[import-untyped]  # slow to import, rarely needed

        whole_blocks = list(model._no_split_modules or ())
        spread = accelerate.infer_auto_device_map(model, no_split_module_classes=whole_blocks)
    else:
        spread = device_map
    # accelerate leaves the weights of such modules on the meta device between runs: nothing could be ranked or cut.
    resting = sorted(module for module, where in spread.items() if str(where) in ("cpu", "disk"))
    if "disk" in spread.values() or 0 < len(resting) < len(spread):
        raise ParameterError(
            f"The model was to be spread over {', '.join(sorted({str(where) for where in spread.values()}))}",
            f"It does not fit into the memory of the devices: {len(resting)} of {len(spread)} modules, {resting[0]!r} "
            "the first, would have no weights of their own there",
            "Set compute.device_map to null and compute.onload to block (one block at a time on the device), or load "
            "it in a smaller dtype such as bfloat16",
        )
    if missing := [name for name in model.state_dict() if not any(_covers(module, name) for module in spread)]:
        raise ParameterError(
            f"A device map of {len(spread)} modules was given",
            f"It says nothing of {missing[0]!r} and {len(missing) - 1} others",
            "Add them, or '' for all that is left",
        )
    return {module: _device(where) for module, where in spread.items()}


def _covers(module: str, name: str) -> bool:
    return module == "" or name == module or name.startswith(f"{module}.")


def _device(where: str | int | torch.device) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(where)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ParameterError(
            f"The device {where!r} was asked for",
            str(error).splitlines()[0],
            "Set compute.device to one that this machine has and torch is built for: cpu, cuda, cuda:1 ...",
        ) from error
    return device


def fill(
    model: PreTrainedModel,
    files: list[Path],
    dtype: torch.dtype,
    devices: dict[str, torch.device],
    family: Family,
    resting: str | None = None,
    finite: bool = True,
) -> None:
    """Read every tensor of a model on the meta device, in place.

    Parameters come out with ``requires_grad`` False; tied ones stay one tensor. Non-persistent buffers,
    which no file holds (rotary frequencies), are computed anew by their modules.

    Args:
        model: with all parameters on the meta device, of the final shapes, tied.
        files: safetensors files.
        dtype: for floating-point tensors.
        devices: as :func:`placement` gives them.
        family: of the model.
        resting: module whose tensors stay mapped in their files, on the CPU and as they are stored; None for none.
            Experts, which files hold one by one, are read into memory.
        finite: whether to look at every number as it is stored, in one pass and without a copy.

    Raises:
        CorruptModel: a file is damaged, or a tensor is missing, unexpected, of another shape or not finite.
    """
    wanted = _Wanted(model, family)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    for part in unpacked(key, tensors.get_slice(key).get_shape()):
                        place = Place(part.name) if family.experts is None else place_of(part.name, family.experts)
                        if name := wanted.name_of(place, file):
                            wanted.check_shape(name, place.expert, part.shape, file)
                            tensor = tensors.get_tensor(key)[part.rows]
                            if finite:
                                check_finite(tensor, key, file)
                            kind = dtype if tensor.is_floating_point() else tensor.dtype
                            rests = resting is not None and _covers(resting, name)
                            found = tensor if rests else tensor.to(_device_of(name, devices), kind)
                            wanted.put(name, place.expert, found)
        except SafetensorError as error:
            raise CorruptModel(
                f"{file} cannot be read: {error}",
                f"A whole safetensors file; this one has {file.stat().st_size} bytes, it may be truncated",
                "Fetch or write the folder again",
            ) from error
    wanted.check_complete(files[0].parent)
    _compute_buffers(model, devices)


def check_finite(tensor: Tensor, key: str, file: Path) -> None:
    """Refuse NaN and infinities: smallest and largest number tell of both, without a mask as large as the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch compares no 8-bit floats
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise CorruptModel(
            f"{file} has a tensor {key!r} with numbers that are NaN or infinite",
            "A model computes nothing with such weights; all must be finite",
            "Fetch the folder again, or go back to the version before the step that made them",
        )


def _compute_buffers(model: PreTrainedModel, devices: dict[str, torch.device]) -> None:
    """The buffers that no file holds, as transformers computes them."""
    for name, module in model.named_modules():
        missing = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for key, buffer in missing.items():
            setattr(module, key, torch.empty_like(buffer, device=_device_of(name, devices)))
        if missing:
            for parameter in module.parameters(recurse=False):
                # transformers' mark of what was read: a scaled embedding keeps its rows, and gets its scale.
                parameter._is_hf_initialized = True
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[no-untyped-call]  # of a library


class _Wanted:
    """The tensors a model needs, each by the first of its names in the state dict, and which have come."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.renamed = {stored: name for name, stored in family.stored_as.items()}
        self.needless = tuple(model._keys_to_ignore_on_load_unexpected or ())
        first: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        self.canonical: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            canonical = first.setdefault(id(tensor), name)
            self.canonical[name] = canonical
            self.aliases.setdefault(canonical, []).append(name)
            self.tensors[canonical] = tensor
        self.done: set[str] = set()
        # Tensor of several experts -> those that have come.
        self.come: dict[str, set[int]] = {}

    def name_of(self, place: Place, file: Path) -> str | None:
        """The canonical name of a tensor in a file; None for one that is not needed (again)."""
        key = place.name
        # OPT and GPT-2 checkpoints of the bare decoder lack the causal-LM model's prefix.
        prefixed = f"{self.model.base_model_prefix}.{key}"
        name = self.canonical.get(self.renamed.get(key, key)) or self.canonical.get(prefixed)
        if name is None:
            # Old Llama checkpoints store rotary frequencies, old GPT ones masks: they follow from the config.
            if any(re.search(needless, key) for needless in (r"rotary_emb\.inv_freq$", *self.needless)):
                return None
            raise CorruptModel(
                f"{file} has a tensor {key!r}",
                f"A {type(self.model).__name__} of this config.json has no such tensor",
                "Use config.json and weights of the same model, without quantisation or adapters",
            )
        if place.expert is not None and place.expert >= (experts := self._experts(name).experts):
            raise CorruptModel(
                f"{file} has {name!r} of expert {place.expert}",
                f"config.json says that there are {experts} experts",
                "Use config.json and weights of the same model",
            )
        return None if name in self.done else name

    def _experts(self, name: str) -> ExpertLinear:
        found = self.model.get_submodule(name.rpartition(".")[0])
        assert isinstance(found, ExpertLinear)  # as its name says
        return found

    def check_shape(self, name: str, expert: int | None, found: list[int], file: Path) -> None:
        tensor = self.tensors[name] if expert is None else self._experts(name).parts[expert]
        if found != (expected := list(tensor.shape)):
            of = "" if expert is None else f" of expert {expert}"
            raise CorruptModel(
                f"{file} has {name!r}{of} of shape {found}",
                f"config.json (with its per_layer_config) says {expected}",
                "Use config.json and weights of the same model",
            )

    def put(self, name: str, expert: int | None, tensor: Tensor) -> None:
        """Set a tensor; or one expert's part of it, with room for the others when the first comes."""
        if expert is None:
            self._set(name, tensor)
            self.done.add(name)
            return
        owner = self._experts(name)
        if name not in self.come:
            self._set(name, torch.empty_like(owner.weight, dtype=tensor.dtype, device=tensor.device))
        come = self.come.setdefault(name, set())
        with torch.no_grad():
            owner.parts[expert].copy_(tensor)
        come.add(expert)
        if len(come) == owner.experts:
            self.done.add(name)

    def _set(self, name: str, tensor: Tensor) -> None:
        is_parameter = isinstance(self.tensors[name], nn.Parameter)
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for alias in self.aliases[name]:
            module, _, attribute = alias.rpartition(".")
            setattr(self.model.get_submodule(module), attribute, value)

    def check_complete(self, path: Path) -> None:
        if missing := [name for name in self.tensors if name not in self.done]:
            raise CorruptModel(
                f"The weights in {path} lack {len(missing)} tensors, the first is {missing[0]!r}",
                f"config.json asks for {len(self.tensors)} tensors",
                "Fetch or write the folder again, or correct the number of layers in config.json",
            )


def _device_of(name: str, devices: dict[str, torch.device]) -> torch.device:
    """The device of the longest module name in the map that contains ``name``."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (device := devices.get(".".join(parts[:length]))) is not None:
            return device
    return devices[""]
