"""Search how much of each layer of a language model can go, remove it, repair the rest by regression."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from ffprune.models.families import FAMILIES, Family

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


def _teach(family: Family, module: ModuleType) -> None:
    from ffprune.models.pretrained import teach

    teach(family, module)


# transformers' classes build pruned models once ffprune is imported, whichever of the two comes first.
for _family in FAMILIES.values():
    register_post_import_hook(
        partial(_teach, _family), f"transformers.models.{_family.package}.modeling_{_family.package}"
    )
