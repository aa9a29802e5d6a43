"""The files in flows/, loaded as Prefect loads them: by path, beside each other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy import REPO


def load(file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a file, such as ``flows/pipeline.py``; forgotten after the test."""
    monkeypatch.syspath_prepend(str(REPO / "flows"))
    spec = importlib.util.spec_from_file_location(Path(file).stem, REPO / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
