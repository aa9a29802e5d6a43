"""Variation as rows of a table: the one way to pick a row by the name that a parameter holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ffprune.core.errors import ParameterError

Row = TypeVar("Row")


def look_up(table: Mapping[str, Row], name: str, parameter: str) -> Row:
    """The row of that name.

    Args:
        table: name -> row.
        name: what the parameter says.
        parameter: the parameter's own name, such as ``search.agent``.

    Raises:
        ParameterError: no such row; the message lists those there are.
    """
    if not table:
        raise ParameterError(
            f"{parameter} {name!r} was asked for",
            "No name is known: what lists them (of entries, their section of params.yaml) is empty",
            f"Add {name!r} there",
        )
    if name not in table:
        raise ParameterError(
            f"{parameter} {name!r} was asked for", f"Known names: {', '.join(sorted(table))}", f"Change {parameter}"
        )
    return table[name]
