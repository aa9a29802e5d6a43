"""The page: headline, tables, figures, where the numbers come from, how to make them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ffprune.stages.figures import interactive
from ffprune.stages.figures.chart import Chart, Panel
from ffprune.stages.page import tables
from ffprune.stages.page.tables import Table

_FOLDER = Path(__file__).parent
_MODEL = {
    "source": "source",
    "revision": "revision",
    "file": "file",
    "sha256": "SHA-256 of the file",
    "quantization": "stored as",
    "storage_dtype": "taken as",
    "architecture": "architecture",
    "parameters": "parameters",
    "vocabulary": "vocabulary",
    "context": "context",
    "license": "licence",
}


@dataclass(frozen=True)
class Content:
    """What the page shows.

    Attributes:
        summary: as in metrics/summary.json: every result comes from there.
        charts: by name.
        downloaded: metrics/download.json, facts on model and text.
        record: metrics/runs/evaluate.json, facts on the run that measured; empty where none was recorded.
        params: sections of params.yaml.
    """

    summary: Mapping[str, Any]
    charts: Mapping[str, Chart]
    downloaded: Mapping[str, Any]
    record: Mapping[str, Any]
    params: Mapping[str, Any]


def render(content: Content) -> str:
    """The page as HTML; the same content gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Written by this project or its libraries, not data: these alone are not escaped.
    environment.globals |= {
        "style": Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        "script": Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
        "library": Markup(interactive.library()),
        "plot": lambda panel, identifier: Markup(interactive.element(panel, identifier)),
        "points": _points,
    }
    summary, record, model = content.summary, content.record, content.downloaded["model"]
    return environment.get_template("page.html").render(
        model=model.get("name", "model"),
        headlines=tables.headlines(summary),
        dense=summary["dense"],
        protocol=summary["protocol"],
        results=tables.results(summary),
        sizes=tables.sizes(summary),
        zero_shot=tables.zero_shot(summary),
        charts=content.charts,
        identity=[
            tables.facts("The dense model", {said: model.get(key) for key, said in _MODEL.items()}),
            tables.facts("Where the text is from", _flat(content.params["data"]["source"])),
            tables.splits(content.downloaded["text"]),
            *([_inputs(record["inputs"])] if record.get("inputs") else []),
        ],
        measured_in=_environment(record),
        commit=record.get("git.commit"),
        dirty=record.get("git.dirty") == "true",
        params=yaml.safe_dump(dict(content.params), sort_keys=False, allow_unicode=True),
    )


def _environment(record: Mapping[str, Any]) -> Table | None:
    """Where and with what the models were measured."""
    if not record:
        return None
    said = {
        "finished": "measured (UTC)",
        "git.commit": "git commit",
        "run_id": "MLflow run of the stage evaluate",
        "parent_run_id": "MLflow run of the execution",
        "processor": "processor",
        "threads": "threads",
    }
    versions = {key.partition(".")[2]: record[key] for key in record if key.startswith("version.")}
    return tables.facts("Environment", {name: record.get(key) for key, name in said.items()} | versions)


def _inputs(hashes: Mapping[str, str]) -> Table:
    return Table("What was measured: DVC's checksums (MD5)", ("path", "checksum"), [[*row] for row in hashes.items()])


def _points(panel: Panel) -> Table:
    """The numbers of a figure, for those who cannot see it or want to copy them."""
    uncertain = any(series.error is not None for series in panel.series)
    rows = [
        [
            series.name,
            f"{x:.6g}",
            f"{y:.6g}",
            *(["" if series.error is None else f"{series.error[number]:.3g}"] if uncertain else []),
        ]
        for series in panel.series
        for number, (x, y) in enumerate(zip(series.x, series.y, strict=True))
    ]
    header = ("series", panel.x_label, panel.y_label, *(["standard error"] if uncertain else []))
    return Table(panel.title, header, rows)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Keys in words; a text may have a source for each of its splits."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key.replace('_', ' ')}"
        found |= _flat(value, f"{name}, ") if isinstance(value, Mapping) else {name: value}
    return found
