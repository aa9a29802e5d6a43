"""Search how much of each layer of a language model can go, remove it, repair the rest by regression."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffprune.models.checkpoint import load_model

__all__ = ["__version__", "load_model"]

__version__ = version("ffprune")


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a model is loaded: ``import ffprune`` stays fast."""
    if name == "load_model":
        from ffprune.models.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
