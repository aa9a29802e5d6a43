"""What the README.md of a model folder tells machines: the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load


def card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata on top of a folder's README.md; empty where there is none, or none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def license_of(metadata: dict[str, Any]) -> str | None:
    """The license that such metadata name."""
    told = metadata.get("license")
    return told if isinstance(told, str) else None
