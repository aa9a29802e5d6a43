"""Files and folders on this machine."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from ffprune.core.errors import DiskFull, MissingInput, UnsafeFile
from ffprune.sources.base import LocalSource

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find(source: LocalSource) -> Path:
    """The path of a local source, absolute.

    Raises:
        MissingInput: nothing is there.
    """
    path = Path(source.path).expanduser().absolute()
    if not path.exists():
        nearest = next(parent for parent in path.parents if parent.exists())
        some = ", ".join(sorted(entry.name for entry in nearest.iterdir())[:8]) or "nothing"
        raise MissingInput(
            f"The local source {path} does not exist",
            f"{nearest} exists and has: {some}",
            "Correct the path in the source; relative paths start at the folder the command runs in",
        )
    return path


def checkpoint_files(path: Path, asked: str) -> tuple[Path, str | None]:
    """The folder to load a model from, and the GGUF file in it if it is one.

    Args:
        path: a checkpoint folder, or a ``.gguf`` file.
        asked: what to call it in messages.

    Returns:
        (folder, name of the GGUF file or None for a safetensors checkpoint).

    Raises:
        UnsafeFile: there are only pickled weights.
        MissingInput: there are no weights, no config.json, or several GGUF files.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return path.parent, path.name
        raise UnsafeFile(
            f"{asked} is to be loaded as a model, and is a single {path.suffix or 'nameless'} file",
            "A model is a folder with config.json and *.safetensors, or one .gguf file; pickled weights are "
            "refused, since loading them can run code",
            "Point the source to such a folder or file",
        )
    if any(path.glob("*.safetensors")):
        if not (path / "config.json").is_file():
            raise MissingInput(
                f"{asked} has safetensors but no config.json",
                "A checkpoint needs both: config.json says what the tensors are",
                "Save the model with save_pretrained, or copy its config.json there",
            )
        missing = _missing_shards(path)
        if missing:
            raise MissingInput(
                f"{asked} lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}",
                "model.safetensors.index.json lists the files the weights are spread over",
                "Copy or download the missing files",
            )
        return path, None
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, ggufs[0].name
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UnsafeFile(
            f"{asked} has its weights only as {', '.join(pickles[:3])}, which are pickles that can run code",
            "Only safetensors and GGUF are loaded",
            "Convert it once where you trust it (load and `save_pretrained`, which writes safetensors), or "
            "use a revision with safetensors: the hub's conversion bot offers many as refs/pr/N",
        )
    raise MissingInput(
        f"{asked} holds {'several GGUF files' if ggufs else 'no weights'}",
        "A model is a folder with config.json and *.safetensors, or one .gguf file",
        "Point the source to the .gguf file you mean" if ggufs else "Point the source to the model's folder",
    )


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(shard for shard in shards if not (folder / shard).is_file())


@contextlib.contextmanager
def explain_full_disk(folder: str) -> Iterator[None]:
    """Turn "no space left on device" into a refusal that teaches.

    Args:
        folder: what was written to, for the message.

    Raises:
        DiskFull: in place of that error.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"A download into {folder} ran out of room",
            "Nothing was left half written: earlier files are as they were",
            "Free some space, or point the cache to another disk",
        ) from error
