"""Libraries that only some formats need: imported when asked for, named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from ffprune.core.errors import MissingInput


def needed(module: str, extra: str) -> ModuleType:
    """Import a library of one of ffprune's extras.

    Args:
        module: its name in Python.
        extra: the extra of ffprune that brings it.

    Raises:
        MissingInput: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a library that was built for another machine
        raise MissingInput(
            f"This needs the Python package {module}, which cannot be imported ({error})",
            f"ffprune brings it with the extra {extra!r}",
            f"pip install 'ffprune[{extra}]'",
        ) from error
