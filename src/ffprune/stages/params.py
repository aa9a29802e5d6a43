"""Reading params.yaml: the whole file is checked before any work; a stage gets its own sections only."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.sections import Params

PARAMS_FILE = Path("params.yaml")
P = TypeVar("P", bound=BaseModel)


class UndeclaredSection(Exception):
    """A stage read a section that its record does not declare, so DVC would not rerun it on a change."""


class Scoped(Generic[P]):
    """A view of validated parameters that shows the declared sections only."""

    def __init__(self, params: P, sections: Iterable[str], reader: str) -> None:
        self._params, self._reader = params, reader
        # 'methods.NAME' declares one entry of a section, 'search.budget' one field.
        self._parts = _grouped(sections)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in type(self._params).model_fields and name not in self._parts:
            raise UndeclaredSection(
                f"{self._reader} reads the parameter section '{name}' without declaring it: "
                f"add it to the stage's params in ffprune/stages/record.py and in dvc.yaml"
            )
        found, parts = getattr(self._params, name), self._parts.get(name, [""])
        if "" in parts:
            return found
        # Fields of a section are seen alone; entries of a mapping, as the mapping that has only them.
        if isinstance(found, BaseModel):
            return Scoped(found, parts, self._reader)
        return {
            entry: found[entry] if "" in inner else Scoped(found[entry], inner, self._reader)
            for entry, inner in _grouped(parts).items()
        }

    def values(self) -> dict[str, Any]:
        """The declared sections as plain values, for tracking and fingerprints."""
        return self._params.model_dump(mode="json", include=_included(self._parts))


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """First part of dotted names -> what comes behind it; '' stands for all of it."""
    found: dict[str, list[str]] = {}
    for head, _, rest in (name.partition(".") for name in names):
        found.setdefault(head, []).append(rest)
    return found


def _included(parts: Mapping[str, list[str]]) -> dict[str, Any]:
    """As pydantic wants to be told what to write."""
    return {head: True if "" in rest else _included(_grouped(rest)) for head, rest in parts.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse YAML 1.2, in which ``1e-4`` is a number (PyYAML reads a string)."""
    if not path.is_file():
        raise MissingInput(
            f"the parameters were asked of {path}, which does not exist",
            "they are read from the folder the command is run in",
            "run the command in the project's folder",
        )
    try:
        values = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        raise ParameterError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}",
            "a file of sections with one 'key: value' a line is expected",
            "mend the line named above",
        ) from error
    if not isinstance(values, dict):
        raise ParameterError(
            f"{path} holds {type(values).__name__}, not sections",
            "a file of sections with one 'key: value' a line is expected",
            "start each section with 'name:'",
        )
    return values


def validate(values: dict[str, Any], path: Path, model: type[P]) -> P:
    """Check every key of the file against ``model``; all that is wrong goes into one message."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(problem, model) for problem in error.errors(include_url=False))
        raise ParameterError(
            f"{path} has {error.error_count()} wrong parameter(s): {problems}",
            "nothing was run and no output was touched",
            "correct the parameters named above",
        ) from error


def load_params(path: Path = PARAMS_FILE, sections: Iterable[str] | None = None, reader: str = "a stage") -> Params:
    """Validate the whole file; the result shows ``sections`` only (all of them when None).

    Raises:
        ParameterError: unknown, missing, mistyped or contradictory parameters (one message for all).
        MissingInput: there is no such file.
    """
    params = validate(read_yaml(path), path, Params)
    if sections is None:
        return params
    return typing.cast(Params, Scoped(params, sections, reader))


def _explain(problem: Any, model: type[BaseModel]) -> str:
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"'{key}' is unknown ({_suggest(where[-1], _fields_at(model, where[:-1]))})"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = f" (given: {problem['input']!r})" if not isinstance(problem["input"], dict | BaseModel) else ""
    return f"'{key}': {message}{given}"


def _suggest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
    meant = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{meant}allowed: {', '.join(allowed)}"


def _fields_at(model: type[BaseModel], where: list[str]) -> list[str]:
    """Names allowed at a place inside the model; list positions and union tags are stepped over."""
    for part in where:
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field else None
        model = inner or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
