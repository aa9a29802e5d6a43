"""Switching model and text: the sections ``model`` and ``data`` of params.yaml, from profiles/NAME.yaml."""

from __future__ import annotations

import re
from pathlib import Path

from ffprune.core.errors import ParameterError
from ffprune.stages.editing import write_parameters
from ffprune.stages.params import PARAMS_FILE, read_yaml

FOLDER = Path("profiles")
SECTIONS = ("model", "data")


def profiles() -> dict[str, str]:
    """Name -> the first comment line of the profile."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        first = file.read_text().partition("\n")[0]
        found[file.stem] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def use_profile(name: str) -> None:
    """Rewrite the two sections; every other line of params.yaml stays as it is.

    Raises:
        ParameterError: no such profile, or the parameters would not be valid; nothing is written then.
    """
    text = with_profile(PARAMS_FILE.read_text(), name)
    write_parameters(text, PARAMS_FILE)


def with_profile(text: str, name: str) -> str:
    """The text of a params.yaml with the profile's two sections.

    Raises:
        ParameterError: no such profile, or one without a section.
    """
    if name not in profiles():
        raise ParameterError(
            f"the profile '{name}' was asked for",
            f"there are {', '.join(profiles()) or 'none'} in {FOLDER}/",
            "name one of these or add a file",
        )
    source = FOLDER / f"{name}.yaml"
    sections = _sections(source.read_text())
    for section in SECTIONS:
        if section not in sections:
            raise ParameterError(
                f"{source} has no section '{section}'",
                "a profile gives both model and data",
                "add the section",
            )
        text = _replace(text, section, sections[section])
    return text


def current_profile() -> str | None:
    """The profile whose two sections params.yaml holds now, if any."""
    now = read_yaml(PARAMS_FILE)
    for name in profiles():
        values = read_yaml(FOLDER / f"{name}.yaml")
        if all(now.get(section) == values.get(section) for section in SECTIONS):
            return name
    return None


def _sections(text: str) -> dict[str, str]:
    """Top-level key -> its lines.

    Text, not a parsed tree: that ties the comment above a section to the section before it.
    """
    found = {}
    for match in re.finditer(r"^([A-Za-z_]\w*):.*\n(?:(?:[ \t].*)?\n)*", _ended(text), flags=re.MULTILINE):
        found[match[1]] = match[0].rstrip("\n") + "\n"
    return found


def _replace(text: str, section: str, lines: str) -> str:
    text = _ended(text)
    old = _sections(text).get(section)
    return text.replace(old, lines, 1) if old else f"{text}\n{lines}"


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
