"""Changing params.yaml by dotted names: comments and order stay, and what would not be valid is not written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ffprune.core.errors import ParameterError
from ffprune.stages.artifacts import write_text
from ffprune.stages.params import PARAMS_FILE, read_yaml, validate
from ffprune.stages.sections import Params


def round_trip() -> YAML:
    """YAML that is written as params.yaml is."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.preserve_quotes = True
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def set_parameters(changes: Mapping[str, Any], file: Path = PARAMS_FILE) -> list[str]:
    """Change parameters in place, all or none.

    Args:
        changes: dotted name (``search.sparsity``) -> its new value.
        file: the parameters.

    Returns:
        ``name: before -> after`` for each that is another now; nothing is written when there is none.

    Raises:
        ParameterError: a name that is none, or values that do not make valid parameters.
        MissingInput: there is no such file.
    """
    read_yaml(file)  # which refuses a file that is none
    yaml = round_trip()
    values = yaml.load(file.read_text())
    told = []
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ParameterError(
                f"the parameter '{name}' was to be changed",
                f"{file} has no '{'.'.join(path)}' with entries",
                "see 'ffprune params list' for the names",
            )
        before = place.get(last)
        if last not in place or before != value:
            told.append(f"{name}: {before} -> {value}")
            place[last] = value
    if told:
        out = io.StringIO()
        yaml.dump(values, out)
        write_parameters(out.getvalue(), file)
    return told


def write_parameters(text: str, file: Path) -> None:
    """Write a params.yaml that is valid.

    Raises:
        ParameterError: it would not be; nothing is written then.
    """
    validate(YAML(typ="safe", pure=True).load(text), file, Params)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words, the values as YAML has them (``0.3``, ``null``, ``[a, b]``).

    Raises:
        ParameterError: a word without ``=``, or a value that is no YAML.
    """
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        try:
            if not sign:
                raise YAMLError("there is no '='")
            found[name] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise ParameterError(
                f"{word!r} was to change a parameter: {' '.join(str(error).split())}",
                "NAME=VALUE is expected, the value as in params.yaml",
                "for example search.sparsity=0.3",
            ) from error
    return found
