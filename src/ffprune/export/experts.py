"""Formats that have no place for a mixture of experts."""

from __future__ import annotations

from pathlib import Path

from ffprune.core.errors import UnsupportedArchitecture
from ffprune.models.config_file import read_config
from ffprune.models.families import family_of


def refuse_experts(folder: Path, form: str) -> None:
    """Refuse a folder whose model has experts, by its config alone.

    Args:
        folder: the model folder.
        form: the format, as people name it.

    Raises:
        UnsupportedArchitecture: it has.
        FfpruneError: there is no config that can be read; see :func:`ffprune.models.checkpoint.load_model`.
    """
    config = read_config(folder, trust_remote_code=False)
    if family_of(config).experts is not None:
        raise UnsupportedArchitecture(
            f"A model of type {config.model_type!r} was to be exported to {form}",
            "Its FFNs are mixtures of experts, which ffprune exports to hf alone",
            "Export to hf, which keeps the model as it is",
        )
