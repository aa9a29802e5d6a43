"""A folder to publish: the model in safetensors, its tokenizer, a model card, and checksums of all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ffprune.core.units import Allocation
from ffprune.export.card import changed, model_card
from ffprune.export.inspection import cut, inspect_model, masked
from ffprune.export.provenance import Provenance
from ffprune.models.checkpoint import load_model, load_tokenizer, save_model, stored_dtype
from ffprune.models.checksum import sha256
from ffprune.models.view import ModelView

CARD, PICTURE, CHECKSUMS = "README.md", "policy.png", "SHA256SUMS"


def write_huggingface(folder: Path, out: Path, known: Provenance, draw: Callable[[Allocation], bytes]) -> None:
    """Write a model folder anew, every tensor checked on the way, with a model card.

    Weights are sharded as :func:`ffprune.models.checkpoint.save_model` does.

    Args:
        folder: the model folder.
        out: an empty folder.
        known: the model's history.
        draw: a picture (PNG) of what is left of every unit.

    Raises:
        FfpruneError: the folder does not load; see :func:`ffprune.models.checkpoint.load_model`.
    """
    model = load_model(folder, stored_dtype(folder))
    save_model(model, load_tokenizer(folder), out)
    view = ModelView(model)
    found = inspect_model(view, out)
    picture = PICTURE if changed(found) else None
    if picture is not None:
        (out / picture).write_bytes(draw(cut(view) if found.removed > 0 else masked(view)))
    (out / CARD).write_text(model_card(known, found, picture), encoding="utf-8")
    write_checksums(out)


def write_checksums(out: Path) -> None:
    """List all files of a folder as ``sha256sum --check`` reads it."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    lines = [f"{sha256(file)}  {file.relative_to(out)}\n" for file in files]
    (out / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
