"""``ffprune inspect``: what a model folder or a GGUF file holds, as a person or a script reads it."""

from __future__ import annotations

import json
from pathlib import Path

from ffprune.export.gguf_check import Contents, check_gguf
from ffprune.export.inspection import Inspection, inspect


def print_inspection(path: Path, as_json: bool) -> None:
    """Print a model's layers and sums.

    Raises:
        FfpruneError: the folder cannot be loaded (:func:`ffprune.export.inspection.inspect`), or the file is not whole
            (:func:`ffprune.export.gguf_check.check_gguf`).
    """
    found = check_gguf(path) if path.suffix == ".gguf" else inspect(path)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    elif isinstance(found, Contents):
        _print_gguf(path, found)
    else:
        _print_folder(path, found)


def _print_folder(folder: Path, found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    console.print(f"{folder}: {found.architecture}, {found.dtype}, {found.bytes / 1e6:,.1f} MB", highlight=False)
    loads = "from_pretrained after `import ffprune`, or with trust_remote_code=True" if found.needs_code else "anywhere"
    console.print(
        f"{found.parameters:,} parameters, {found.prunable:,} of them prunable; loads {loads}", highlight=False
    )
    console.print(
        f"removed: {found.removed:.1%} of the prunable weights of a model as wide as config.json's global values; "
        f"zero: {found.zeros:.1%} of what is there",
        highlight=False,
    )
    table = Table()
    for column in ("layer", "query heads", "key/value heads", "FFN channels", "weights", "zero"):
        table.add_column(column, justify="right")
    for row in found.layers:
        widths = (
            f"{now} of {whole}" if now != whole else f"{now}" for now, whole in (row.heads, row.groups, row.channels)
        )
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
    table = Table()
    for column in ("layer", "query heads", "key/value heads", "FFN channels"):
        table.add_column(column, justify="right")
    for layer, widths in enumerate(zip(found.heads, found.groups, found.channels, strict=True)):
        table.add_row(str(layer), *map(str, widths))
    console.print(table)
