"""Sources as rows of one table: where a model or a text comes from, and the parameters that name it.

A source is data, not code: ``kind`` picks the row (``pypi``, ``local``, ``hub``), and for texts ``splits``
names one source per split. The functions that act on a row live in :mod:`ffprune.sources.model` and
:mod:`ffprune.sources.text`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

StorageDtype = Literal["float32", "float16", "bfloat16"]
TextFormat = Literal["wikipedia", "plain", "jsonl"]
SPLITS = ("calibration", "validation", "test")

_SHA256 = r"^[0-9a-f]{64}$"
_PINNED = r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$"


@dataclass(frozen=True)
class Article:
    """One document of a text, the smallest piece that a split may move.

    Attributes:
        title: its heading, or ``part 0001`` where the text has no headings.
        text: its characters, with the blank lines that end it: texts joined end to end read as one text.
    """

    title: str
    text: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PypiSource(_Row):
    """One file inside a wheel of the Python package registry (whichever pip is configured to use).

    Attributes:
        package: the exact version, ``name==version``.
        member: path of the file inside the wheel.
        sha256: of the wheel, hexadecimal; for pure wheels, which are the same file on every platform.
        member_sha256: of the file inside, for wheels that differ per platform. One of the two must be given.
    """

    kind: Literal["pypi"] = "pypi"
    package: str = Field(pattern=_PINNED)
    member: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern=_SHA256)
    member_sha256: str | None = Field(default=None, pattern=_SHA256)

    @model_validator(mode="after")
    def _has_a_checksum(self) -> Self:
        if self.sha256 is None and self.member_sha256 is None:
            raise ValueError("a pypi source needs `sha256` (wheel) or `member_sha256` (file inside), or both")
        return self


class LocalSource(_Row):
    """A file or folder on this machine: a checkpoint folder, a GGUF file, or a text file.

    Attributes:
        path: absolute, or relative to the folder the command runs in; ``~`` is understood.
    """

    kind: Literal["local"] = "local"
    path: str = Field(min_length=1)


class HubSource(_Row):
    """A model or dataset of the Hugging Face hub.

    Attributes:
        id: ``owner/name``.
        revision: a commit (best: it never moves), tag, branch or ``refs/pr/N``.
        config: configuration name of a dataset; unused for models.
        split: split of a dataset, such as ``train`` or ``train[:1%]``; needed for texts, unused for models.
    """

    kind: Literal["hub"] = "hub"
    id: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
    revision: str = Field(default="main", min_length=1)
    config: str | None = None
    split: str | None = None


Source = Annotated[PypiSource | LocalSource | HubSource, Field(discriminator="kind")]


class SplitSources(_Row):
    """Three named sources, for texts that come with official splits (such as WikiText-2)."""

    kind: Literal["splits"] = "splits"
    calibration: Source
    validation: Source
    test: Source


TextSource = Annotated[PypiSource | LocalSource | HubSource | SplitSources, Field(discriminator="kind")]


class Shares(_Row):
    """Share of the text, by characters, that each split gets; the three add up to 1."""

    calibration: float = Field(gt=0, lt=1)
    validation: float = Field(gt=0, lt=1)
    test: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = self.calibration + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:g}, not 1: change one of them by {1 - total:+g}")
        return self


class ModelParams(_Row):
    """The section ``model`` of params.yaml.

    Attributes:
        source: where the model comes from.
        trust_remote_code: whether Python code that comes with the model may run (false refuses it).
        storage_dtype: number format of the saved dense model.
    """

    source: Source
    trust_remote_code: bool = False
    storage_dtype: StorageDtype = "float16"


class TextParams(_Row):
    """The section ``data`` of params.yaml.

    Attributes:
        source: where the text comes from: one source, cut up by ``shares``, or ``kind: splits`` with three.
        format: ``wikipedia`` (MediaWiki XML export), ``plain`` (one string) or ``jsonl`` (a document a row).
        field: name of the field with the text, for ``jsonl`` and for hub datasets.
        shares: share of each split; not for ``kind: splits``.
        seed: of the assignment of articles to splits.
    """

    source: TextSource
    format: TextFormat
    field: str = Field(default="text", min_length=1)
    shares: Shares | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _shares_fit_the_source(self) -> Self:
        if isinstance(self.source, SplitSources) and self.shares is not None:
            raise ValueError("`kind: splits` names a source per split already: remove `shares`")
        if not isinstance(self.source, SplitSources) and self.shares is None:
            raise ValueError("one source needs `shares` (calibration, validation, test), or `kind: splits`")
        return self


def describe(source: PypiSource | LocalSource | HubSource) -> str:
    """One phrase for messages and logs, such as ``facebook/opt-125m@main on the Hugging Face hub``."""
    if isinstance(source, PypiSource):
        return f"{source.member} in the wheel {source.package}"
    if isinstance(source, LocalSource):
        return f"the local path {source.path}"
    return f"{source.id}@{source.revision} on the Hugging Face hub"


def distribution(package: str) -> tuple[str, str]:
    """``name==version`` as (normalised name, version)."""
    name, version = package.split("==", 1)
    return re.sub(r"[-_.]+", "_", name).lower(), version
