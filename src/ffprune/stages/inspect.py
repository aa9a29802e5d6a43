"""``ffprune inspect``: what a model folder or a GGUF file holds, as a person or a script reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ffprune.export.gguf_check import Contents, check_gguf
from ffprune.export.inspection import Inspection, inspect
from ffprune.models.layer_config import LayerShape

_MAGIC = b"GGUF"
_WIDTHS = ("layer", "query heads", "key/value heads", "FFN channels")


def print_inspection(path: Path, as_json: bool) -> None:
    """Print a model's layers and sums.

    Raises:
        FfpruneError: the folder cannot be loaded (:func:`ffprune.export.inspection.inspect`), or the file is not whole
            (:func:`ffprune.export.gguf_check.check_gguf`).
    """
    found = check_gguf(path) if _is_gguf(path) else inspect(path)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    elif isinstance(found, Contents):
        _print_gguf(path, found)
    else:
        _print_folder(path, found)


def _is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name; by its name, where it is cut short, damaged or not there."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return True
    return path.suffix == ".gguf" and not path.is_dir()


def _print_folder(folder: Path, found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    console.print(f"{folder}: {found.architecture}, {found.dtype}, {found.bytes / 1e6:,.1f} MB", highlight=False)
    loads = "from_pretrained after `import ffprune`, or with trust_remote_code=True" if found.needs_code else "anywhere"
    console.print(
        f"{found.parameters:,} parameters, {found.prunable:,} of them prunable; loads {loads}", highlight=False
    )
    whole = "the dense model" if found.dense_told else "a model as wide as config.json's global values"
    console.print(
        f"removed: {found.removed:.1%} of the prunable weights of {whole}; zero: {found.zeros:.1%} of what is there",
        highlight=False,
    )
    table = Table()
    for column in (*_WIDTHS, "weights", "zero"):
        table.add_column(column, justify="right")
    for row in found.layers:
        widths = _of((row.heads, row.groups, row.channels))
        table.add_row(str(row.layer), *widths, f"{row.weights:,}", f"{row.zeros:.1%}" if row.zeros >= 0.0005 else "")
    console.print(table)


def _print_gguf(path: Path, found: Contents) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    formats = ", ".join(f"{count} {name}" for name, count in found.formats.items())
    console.print(f"{path}: {found.architecture}, {found.bytes / 1e6:,.1f} MB; tensors: {formats}", highlight=False)
    seal = "the bytes are those that ffprune wrote" if found.sealed else "no checksum of ffprune's in it"
    console.print(f"whole: widths agree with tensors; {seal}", highlight=False)
    cut = found.cut
    if cut is not None:
        console.print(f"removed: {cut.removed:.1%} of the prunable weights of the dense model", highlight=False)
    channels = found.channels if cut is None else cut.channels
    filled = channels != found.channels
    table = Table()
    for column in (*_WIDTHS, *(["filled up to"] if filled else [])):
        table.add_column(column, justify="right")
    for layer, widths in enumerate(zip(found.heads, found.groups, channels, strict=True)):
        whole = LayerShape(*widths) if cut is None else cut.dense
        end = [str(found.channels[layer])] if filled else []
        table.add_row(str(layer), *_of(zip(widths, whole, strict=True)), *end)
    console.print(table)


def _of(widths: Iterable[tuple[int, int]]) -> list[str]:
    """Widths of a layer, and the dense model's where they are others."""
    return [f"{now} of {whole}" if now != whole else f"{now}" for now, whole in widths]
