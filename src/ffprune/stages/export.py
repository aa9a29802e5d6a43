"""``ffprune export``: a model folder as other programs read it, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

from ffprune.core.errors import ParameterError
from ffprune.core.tables import look_up
from ffprune.core.units import Allocation
from ffprune.export.experts import refuse_experts
from ffprune.export.table import FORMATS, Format, Request
from ffprune.stages import artifacts
from ffprune.stages.origin import origin_of

_DPI = 120


def export_model(folder: Path, out: Path, to: str, kind: str | None = None, force: bool = False) -> None:
    """Write a model folder in another format, and tell what was written.

    Args:
        folder: with config.json and safetensors.
        out: a file or a folder, as the format has it; on failure what it held before stays.
        to: name of the format.
        kind: one of the format's kinds; None: the first.
        force: whether to replace what is there.

    Raises:
        ParameterError: no such format or kind, or an ``out`` that is in the way.
        FfpruneError: the folder does not load, or the format cannot hold the model.
    """
    row = look_up(FORMATS, to, "--to")
    kind = _kind(row, to, kind)
    _check_out(row, folder, out, force)
    if not row.experts:
        refuse_experts(folder, to)
    with artifacts.atomic_dir(out) if row.folder else artifacts.atomic_file(out) as place:
        remarks = row.write(Request(folder, place, kind, origin_of(folder), _draw))
    files = [file for file in out.rglob("*") if file.is_file()] if row.folder else [out]
    print(f"{out}: {row.about}, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    for remark in remarks:
        print(remark)


def _draw(left: Allocation) -> bytes:
    """What is left of every unit, or of every matrix, as a PNG."""
    from ffprune.stages import figures  # matplotlib is slow to import

    structured = all(unit.kind != "weight" for unit in left.units)
    figure = figures.policy({"this model": left}) if structured else figures.matrix_policy(left)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _kind(row: Format, to: str, kind: str | None) -> str:
    if kind is None or kind in row.kinds:
        return kind or next(iter(row.kinds), "")
    raise ParameterError(
        f"--type {kind} was asked for with --to {to}",
        f"It has {', '.join(row.kinds) or 'no types'}",
        "Change --type, or leave it out",
    )


def _check_out(row: Format, folder: Path, out: Path, force: bool) -> None:
    """Refuse to write where something is that may be wanted."""
    source, target = folder.resolve(), out.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ParameterError(
            f"{out} was to be written from {folder}",
            "One lies inside the other, and the model folder must stay what it is",
            "Name a place beside it",
        )
    if out.exists() and out.is_dir() != row.folder:
        raise ParameterError(
            f"{out} was to be written as a {'folder' if row.folder else 'file'}",
            f"There is a {'file' if row.folder else 'folder'} of that name",
            "Name another place",
        )
    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise ParameterError(
            f"{out} was to be written",
            "It exists, and is not empty",
            "Name another place, or add --force to replace it",
        )
