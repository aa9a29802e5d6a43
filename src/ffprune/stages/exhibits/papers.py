"""The papers' tables and figures as data (``ffprune/papers/*.yaml``): their recipes and the numbers they print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

import ffprune
from ffprune.core.tables import look_up
from ffprune.stages.params import read_yaml, validate
from ffprune.stages.sections import First, QuantiseParams, Recipe, Section

FOLDER = Path(ffprune.__path__[0]) / "papers"
PAPERS = ("fastforward", "sparsitysolver", "mixed_sparsity")
FULL_ONLY = "in the full variant: add --full"
T = TypeVar("T")


class Choice(Section, Generic[T]):
    """A value of the short and one of the full variant; written plainly it holds for both."""

    short: T
    full: T

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return (
            value if isinstance(value, dict) and value.keys() == {"short", "full"} else {"short": value, "full": value}
        )

    def of(self, full: bool) -> T:
        """The value of a variant."""
        return self.full if full else self.short


class Row(Section):
    """A row of a table: a method, its sparsities and what it adds to the method's recipe, or why there is none."""

    label: str | None = None
    method: str | None = None
    reason: str | None = None
    sparsities: Choice[tuple[float, ...]] | None = None
    full_only: bool = False
    trials: Choice[int | None] | None = None
    first: Choice[First | None] | None = None
    calibration_windows: Choice[int | None] | None = None
    quantize: QuantiseParams | None = None
    pattern: str | None = None

    @model_validator(mode="after")
    def _run_or_excused(self) -> Self:
        if (self.method is None) == (self.reason is None):
            raise ValueError("a row has either a method or the reason why it has none")
        return self

    def added(self, full: bool) -> dict[str, Any]:
        """What the row writes over the method's recipe."""
        given = {key: getattr(self, key) for key in ("trials", "first", "calibration_windows", "quantize", "pattern")}
        chosen = {key: value.of(full) if isinstance(value, Choice) else value for key, value in given.items()}
        return {key: value for key, value in chosen.items() if value is not None}


class Asked(Section):
    """What a whole table asks of its models besides perplexity."""

    zero_shot: bool = False
    speed: bool = False


@dataclass(frozen=True)
class Entry:
    """A row at one sparsity.

    Attributes:
        label: as the paper calls the row.
        sparsity: the target, removed / prunable.
        name: of the method in the section ``methods``; None when it is not run.
        recipe: complete, as plain values; empty when it is not run.
        reason: why it is not run.
    """

    label: str
    sparsity: float
    name: str | None
    recipe: dict[str, Any]
    reason: str | None


class Model(Section):
    """A model that a paper reports on.

    Attributes:
        billions: parameters.
        profile: a file in profiles/.
        hub: name on the Hugging Face hub, for a profile of one's own.
        like: the profile to copy for it.
        reason: why it cannot be run whatever the machine.
    """

    billions: float = Field(gt=0)
    profile: str | None = None
    hub: str | None = None
    like: str | None = None
    reason: str | None = None

    @property
    def here(self) -> str:
        """How to run it, or what is in the way."""
        needs = f"needs about {2 * self.billions:g} GB: a {self.billions:g}B model in 16 bits"
        if self.profile:
            return f"`--model {self.profile}`; {needs}"
        if self.reason:
            return f"{needs}; {self.reason}"
        return f"{needs}; no profile has it: copy profiles/{self.like}.yaml and name {self.hub} in it"


def _split(line: Any) -> Any:
    return tuple(cell.strip() for cell in line.split("|")) if isinstance(line, str) else line


Line = Annotated[tuple[str, ...], BeforeValidator(_split)]


class Printed(Section):
    """Numbers as the paper prints them, written ``cell | cell | cell``."""

    columns: Line
    rows: tuple[Line, ...] = Field(min_length=1)
    note: str | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, but {len(row)} cells in: {' | '.join(row)}")
        return self


class Exhibit(Section):
    """A table or figure of a paper.

    Attributes:
        name: such as ``ff-table-2``.
        paper: the paper's title.
        title: what the table shows.
        minutes: default model, two methods at a time on two cores; the short variant's were measured.
        sparsities: of every row that names none.
        every: what is asked of every row's model.
        columns: what is shown of a result (names of ``columns.COLUMNS`` and ``columns.TEXTS``).
        drawing: how it is drawn (a name of ``drawings.DRAWINGS``).
        traces: whether it shows the Hessian traces of the stage sensitivity instead of results.
        rows: in the paper's order.
        notes: where ours differs from the paper's.
        models: label -> :class:`Model`, those of the paper's table.
        printed: the paper's own numbers; None for a figure.
    """

    name: str
    paper: str
    title: str
    minutes: Choice[int]
    sparsities: Choice[tuple[float, ...]] = Choice(short=(), full=())
    every: Asked = Asked()
    columns: tuple[str, ...] = ()
    drawing: str
    traces: bool = False
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    models: dict[str, Model]
    printed: Printed | None = None

    @property
    def heading(self) -> str:
        """As people cite it: ``FF Table 2``."""
        paper, kind, number = self.name.split("-")
        return f"{paper.upper()} {'Table' if kind == 'table' else 'Fig.'} {number}"

    def entries(self, full: bool) -> tuple[Entry, ...]:
        """Every row at every sparsity, in order of sparsity; those of the full variant alone say so."""
        return _expand(self.rows, self.sparsities, self.every, full)

    def recipes(self, full: bool) -> dict[str, dict[str, Any]]:
        """Method name -> complete recipe, as plain values; the dense model is always among them, for the ratios."""
        return _recipes(self.entries(full), self.every, full)


class Comparison(Section):
    """The methods that ``ffprune compare`` sets side by side.

    Attributes:
        minutes: default model, two methods at a time on two cores; the short variant's were measured.
        rows: each with its sparsities.
    """

    minutes: Choice[int]
    rows: tuple[Row, ...]

    def recipes(self, full: bool) -> dict[str, dict[str, Any]]:
        """Method name -> complete recipe, as plain values; the dense model is among them, for the ratios."""
        return _recipes(_expand(self.rows, Choice(short=(), full=()), Asked(), full), Asked(), full)


class _Paper(Section):
    short: str
    title: str
    exhibits: dict[str, dict[str, Any]]


class _Methods(Section):
    defaults: dict[str, Any]
    methods: dict[str, dict[str, Any]]


@cache
def exhibits() -> dict[str, Exhibit]:
    """Every table and figure, by name, paper by paper."""
    models = {label: validate(values, FOLDER / "models.yaml", Model) for label, values in _read("models").items()}
    found = {}
    for file in PAPERS:
        path = FOLDER / f"{file}.yaml"
        paper = validate(_read(file), path, _Paper)
        for name, values in paper.exhibits.items():
            wanted = {label: look_up(models, label, f"{name}: model") for label in values.get("models", ())}
            found[name] = validate({**values, "name": name, "paper": paper.title, "models": wanted}, path, Exhibit)
    return found


def exhibit(name: str) -> Exhibit:
    """A table or figure by its name, such as ``ff-table-2`` (in any case).

    Raises:
        ParameterError: there is none; the message lists those there are.
    """
    return look_up(exhibits(), name.lower(), "the table or figure")


@cache
def comparison_methods() -> Comparison:
    """The methods of ``ffprune compare``."""
    return validate(_read("comparison"), FOLDER / "comparison.yaml", Comparison)


def compressor_of(method: str) -> str:
    """The compressor of a method that the papers' rows name."""
    return str(_methods().methods[method]["compressor"])


def recipe_name(method: str, recipe: Recipe) -> str:
    """The method's name and what was added to it: ``sparsitysolver-ridge-30-t15-from20t45``.

    What is measured besides perplexity is no part of it: a method that two tables measure differently runs once.
    """
    parts = [method]
    if recipe.sparsity:
        parts.append(_percent(recipe.sparsity))
    if recipe.pattern:
        parts.append(recipe.pattern.replace(":", "of"))
    if recipe.trials:
        parts.append(f"t{recipe.trials}")
    if recipe.first:
        parts.append(f"from{_percent(recipe.first.sparsity)}t{recipe.first.trials}")
    if recipe.calibration_windows:
        parts.append(f"c{recipe.calibration_windows}")
    if recipe.quantize:
        parts.append(f"q{recipe.quantize.bits}g{recipe.quantize.group_size}")
    return "-".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:g}".replace(".", "p")


def _expand(rows: Iterable[Row], default: Choice[tuple[float, ...]], every: Asked, full: bool) -> tuple[Entry, ...]:
    entries = []
    for row in rows:
        sparsities = row.sparsities or default
        for sparsity in sparsities.full:
            left_out = not full and (row.full_only or sparsity not in sparsities.short)
            entries.append(_entry(row, sparsity, every, full, FULL_ONLY if left_out else row.reason))
    return tuple(sorted(entries, key=lambda entry: entry.sparsity))


def _entry(row: Row, sparsity: float, every: Asked, full: bool, reason: str | None) -> Entry:
    if row.method is None:
        return Entry(str(row.label), sparsity, None, {}, row.reason)
    table = _methods()
    method = look_up(table.methods, row.method, "the method of a row")
    label = row.label or str(method["label"])
    if reason:
        return Entry(label, sparsity, None, {}, reason)
    values = {**table.defaults, **method, **every.model_dump(), **row.added(full), "sparsity": sparsity}
    recipe = validate(values, FOLDER / "methods.yaml", Recipe)
    return Entry(label, sparsity, recipe_name(row.method, recipe), recipe.model_dump(), None)


def _recipes(entries: Iterable[Entry], every: Asked, full: bool) -> dict[str, dict[str, Any]]:
    found = {entry.name: entry.recipe for entry in entries if entry.name is not None}
    if not found:
        return {}
    dense = _entry(Row(method="dense"), 0.0, every, full, None)
    return {str(dense.name): dense.recipe} | found


@cache
def _methods() -> _Methods:
    return validate(_read("methods"), FOLDER / "methods.yaml", _Methods)


def _read(file: str) -> dict[str, Any]:
    return read_yaml(FOLDER / f"{file}.yaml")
