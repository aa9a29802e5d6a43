"""``ffprune inspect``: what a model folder holds, as a person or a script reads it."""

from __future__ import annotations

import json
from pathlib import Path

from ffprune.export.inspection import inspect


def print_inspection(folder: Path, as_json: bool) -> None:
    """Print a folder's layers and sums.

    Raises:
        FfpruneError: the folder cannot be loaded; see :func:`ffprune.export.inspection.inspect`.
    """
    found = inspect(folder)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
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
