"""Where a result comes from: git commit, library versions, hashes of inputs, a checkpoint's fingerprint."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ffprune

LIBRARIES = (
    "ffprune",
    "torch",
    "transformers",
    "safetensors",
    "stable-baselines3",
    "lm-eval",
    "numpy",
    "dvc",
    "prefect",
    "mlflow",
)
# Larger files are known by size and time: reading gigabytes for a key would cost more than it saves.
_HASHED_UP_TO = 64 * 1024**2


def repository(folder: Path) -> Path:
    """The nearest folder from this one upwards that DVC has initialised (studies lie inside a project), or itself."""
    return next((place for place in (folder, *folder.absolute().parents) if (place / ".dvc").is_dir()), folder)


# What a run writes itself, in the project and in studies: behind its first stage the clone would never be clean.
_OWN_WRITES = ("dvc.lock", "metrics/*.json", ".gitignore")


def git_state(folder: Path) -> dict[str, str]:
    """Commit and whether tracked files differ from it, but for those that runs write; empty outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    others = (":(top)", *(f":(top,exclude,glob)**/{name}" for name in _OWN_WRITES))
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *others)
    return {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[f"version.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, Any]:
    """What measured times are of: the processor (or GPU) behind a torch device, and the threads in use."""
    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(models, platform.machine())
    return {"processor": name, "threads": torch.get_num_threads()}


def input_hashes(deps: Iterable[str]) -> dict[str, str]:
    """DVC's hash of each input: from dvc.lock (the stages before have just written it), else computed."""
    recorded = recorded_hashes(Path("dvc.lock"))
    return {dep: recorded.get(dep) or content_key(Path(dep)) for dep in deps}


def content_key(path: Path) -> str:
    """A cheap key of a file's or folder's content (md5 as DVC uses, size and time for large files)."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        return _md5("\n".join(f"{p.relative_to(path)} {content_key(p)}" for p in inside).encode())
    if not path.exists():
        return "missing"
    stat = path.stat()
    if stat.st_size > _HASHED_UP_TO:
        return f"size-{stat.st_size}-time-{stat.st_mtime_ns}"
    return _md5(path.read_bytes())


def fingerprint(params: Mapping[str, Any], deps: Iterable[str]) -> str:
    """Key of a checkpoint: own parameters, content of the inputs and the package's code.

    A checkpoint continues only the very computation that wrote it; any change starts anew.
    """
    code = sorted(Path(ffprune.__path__[0]).rglob("*.py"))
    parts = [
        json.dumps(params, sort_keys=True),
        *(f"{dep} {content_key(Path(dep))}" for dep in sorted(deps)),
        *(content_key(file) for file in code),
    ]
    return _md5("\n".join(parts).encode())[:16]


def read_lock(lock: Path) -> dict[str, Any]:
    """The stages of a dvc.lock by name, with parameters and hashes as they were; none where there is no such file."""
    if not lock.is_file():
        return {}
    from ruamel.yaml import YAML

    stages: dict[str, Any] = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    return stages


def recorded_hashes(lock: Path) -> dict[str, str]:
    """DVC's hash of every output that a dvc.lock records."""
    return made_hashes(read_lock(lock))


def made_hashes(stages: Mapping[str, Any]) -> dict[str, str]:
    """DVC's hash of every output, by the stages of a dvc.lock."""
    return _hashes(out for stage in stages.values() for out in stage.get("outs", []))


def read_hashes(stages: Mapping[str, Any], name: str) -> dict[str, str]:
    """DVC's hash of everything that a stage read when it ran; none where it has not."""
    return _hashes(stages.get(name, {}).get("deps", []))


def _hashes(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
