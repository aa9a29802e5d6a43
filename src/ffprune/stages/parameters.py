"""The reference of parameters: what params.yaml says of each, its type, and the stages that read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ffprune.core.errors import ParameterError
from ffprune.export.markdown import markdown_table
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.record import ENTRIES, STAGES
from ffprune.stages.sections import Params

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "minLength": "length >="}
_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")

_TITLE = """# Parameters

Made from `params.yaml` by `ffprune params list --markdown`: every key with its default, what is allowed, and the stages
that read it. The stages behind those rerun too, as far as their inputs change."""


@dataclass(frozen=True)
class Parameter:
    """One key of params.yaml.

    Attributes:
        key: dotted from the top.
        value: as the file has it; None for a section.
        type: what is allowed.
        meaning: the comment beside the key, or above it.
        stages: that read it; those behind them rerun too where their inputs change.
    """

    key: str
    value: Any
    type: str
    meaning: str
    stages: tuple[str, ...]


def parameters(path: Path = PARAMS_FILE, below: Sequence[str] = ()) -> list[Parameter]:
    """Every key of the file in its order, or those that are named, with all below them.

    Raises:
        ParameterError: the file has a wrong parameter, or none of a name.
    """
    load_params(path)
    text = path.read_text(encoding="utf-8")
    schema = Params.model_json_schema()
    found = list(_walk(YAML().load(text), schema, schema["$defs"], text.splitlines(), ""))
    known = [parameter.key for parameter in found]
    for name in below:
        if name not in known:
            raise ParameterError(
                f"the parameter '{name}' was asked for",
                f"{path} has no such key; its sections are {', '.join(key for key in known if '.' not in key)}",
                "name a key as 'ffprune params list' shows it, such as ridge.damping",
            )
    return [p for p in found if not below or any(p.key == name or p.key.startswith(f"{name}.") for name in below)]


def print_parameters(found: Sequence[Parameter], as_json: bool, as_markdown: bool) -> None:
    """Print them: for people, for scripts, or as the page of the documentation."""
    if as_json:
        print(json.dumps([asdict(parameter) for parameter in found], indent=2))
    elif as_markdown:
        print(reference(found), end="")
    else:
        for parameter in found:
            value = "" if parameter.type == "section" else f" = {_plain(parameter.value)}  [{parameter.type}]"
            print(f"{parameter.key}{value}")
            print(f"    {parameter.meaning}" if parameter.meaning else "", end="\n" if parameter.meaning else "")
            if "." not in parameter.key or len(found) == 1:
                print(f"    read by: {', '.join(parameter.stages) or 'no stage'}")


def reference(found: Sequence[Parameter]) -> str:
    """A page in Markdown: a chapter a section of the file."""
    chapters: dict[str, list[Parameter]] = {}
    for parameter in found:
        chapters.setdefault(parameter.key.partition(".")[0], []).append(parameter)
    parts = [_TITLE]
    for name, inside in chapters.items():
        head, rows = inside[0], [p for p in inside if p.type != "section"]
        readers = f"\n\nRead by: {', '.join(head.stages)}." if head.stages else ""
        meaning = f"\n\n{head.meaning}" if head.type == "section" and head.meaning else ""
        table = markdown_table(("key", "default", "allowed", "meaning"), [_cells(p) for p in rows])
        parts.append(f"## {name}{meaning}{readers}" + (f"\n\n{table}" if rows else ""))
    return "\n\n".join(parts) + "\n"


def _cells(parameter: Parameter) -> list[str]:
    shown = (f"`{parameter.key}`", f"`{_plain(parameter.value)}`", parameter.type, parameter.meaning)
    return [cell.replace("|", "\\|") for cell in shown]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "[]"
    return json.dumps(value) if value is None or isinstance(value, bool | dict) else str(value)


def _walk(
    values: Any, schema: Mapping[str, Any], definitions: Mapping[str, Any], lines: Sequence[str], above: str
) -> Iterator[Parameter]:
    for name, value in values.items():
        key = f"{above}.{name}" if above else str(name)
        inner = _resolved(_inside(schema, str(name)), definitions, value)
        nested = isinstance(value, dict) and bool(value)
        # What `<<` brings along has its comment where it stands.
        place = (values.lc.data or {}).get(name)
        yield Parameter(
            key,
            None if nested else _bare(value),
            "section" if nested else _type(inner, definitions),
            _meaning(lines, place[0]) if place else "",
            tuple(_readers(key)),
        )
        if nested:
            yield from _walk(value, inner, definitions, lines, key)


def _inside(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The schema of a field, or of an entry of a mapping with names of one's own."""
    patterned: Mapping[str, Any] = next(iter(schema.get("patternProperties", {}).values()), {})
    found: Mapping[str, Any] = schema.get("properties", {}).get(name) or schema.get("additionalProperties") or patterned
    return found


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """The schema behind references; of several kinds, the one that the value says it is."""
    if "$ref" in schema:
        found: Mapping[str, Any] = definitions[schema["$ref"].rpartition("/")[2]]
        return found
    if "discriminator" in schema and isinstance(value, dict):
        name, kinds = schema["discriminator"]["propertyName"], schema["discriminator"]["mapping"]
        chosen = _resolved({"$ref": kinds[value[name]]}, definitions, value)
        return {**chosen, "properties": {**chosen["properties"], name: {"enum": list(kinds)}}}
    return schema


def _type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(_resolved(one, definitions, None), definitions) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(_resolved(schema.get('items', {}), definitions, None), definitions)}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([names.get(str(schema.get("type")), "section"), *bounds])


def _meaning(lines: Sequence[str], number: int) -> str:
    """The comment on a key's line, behind those that stand alone right above it."""
    own = _COMMENT.search(lines[number])
    indent = len(lines[number]) - len(lines[number].lstrip())
    alone: list[str] = []
    for line in reversed(lines[:number]):
        if not line.lstrip().startswith("#") or len(line) - len(line.lstrip()) != indent:
            break
        alone.insert(0, line.lstrip().removeprefix("#").strip())
    return " ".join([*alone, *([own[1].strip()] if own else [])])


def _readers(key: str) -> Iterator[str]:
    """Stages that declare the key, something above it, or something below it."""
    for stage in (*STAGES, *ENTRIES):
        section, _, below = key.partition(".")
        entry = below.partition(".")[0] if section == stage.each and below else "NAME"
        declared = (name.replace("${key}", entry) for name in stage.params)
        if any(_related(name, key) for name in declared):
            yield stage.name if stage.each is None else f"{stage.name}@NAME"


def _related(declared: str, key: str) -> bool:
    return declared == key or declared.startswith(f"{key}.") or key.startswith(f"{declared}.")


def _bare(value: Any) -> Any:
    """Without what the parser remembers of the file."""
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if isinstance(value, bool) or value is None:
        return value
    return next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), {})
