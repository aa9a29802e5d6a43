"""Which files of the package a module imports, directly or not."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.toy import REPO

SOURCE = REPO / "src"

# Carries values but computes none of them; dvc.yaml says why they are no dependencies.
INFRASTRUCTURE = {"ffprune/__init__.py", "ffprune/stages/__init__.py"} | {
    f"ffprune/stages/{name}.py"
    for name in (
        "artifacts",
        "cluster",
        "context",
        "environment",
        "execution",
        "graph",
        "integrity",
        "launch",
        "lifeline",
        "lineage",
        "parameters",
        "params",
        "profiles",
        "progress",
        "record",
        "registry",
        "reproduce",
        "run",
        "sections",
        "table",
        "tracking",
        "workers",
    )
}


def closure(module: str, without: frozenset[str] = frozenset()) -> set[str]:
    """Files (relative to src) behind a module, without infrastructure and ``without``."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file = _file_of(waiting.pop())
        if file is None or str(file) in found | INFRASTRUCTURE | without:
            continue
        found.add(str(file))
        waiting.extend(_imports(SOURCE / file))
    return found


@functools.cache
def _imports(file: Path) -> list[str]:
    return list(_imported(file))


def _imported(file: Path) -> Iterator[str]:
    for node in _running(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not used in this project"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            # Importing a.b.c runs a, a.b and a.b.c.
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1) if parts[0] == "ffprune")


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: imports for type checkers do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def _file_of(module: str) -> Path | None:
    path = Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if (SOURCE / file).is_file():
            return file
    return None
