"""One record per stage: what it reads and writes, for three doors (DVC, the Prefect flow, a direct call).

dvc.yaml is the source of truth for the graph; a test proves that it and these records agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePath


@dataclass(frozen=True)
class Stage:
    """What one stage may touch. Code dependencies stand in dvc.yaml alone.

    Attributes:
        name: the stage's name in dvc.yaml, on the command line and of its module; ``method@NAME`` for one of many.
        help: one line for ``ffprune --help``.
        params: sections of params.yaml that it may read, or ``SECTION.FIELD``.
        deps: data that it reads (as written in dvc.yaml, templates unresolved).
        outs: cached data that it writes.
        metrics: JSON files shown by ``dvc metrics``.
        plots: CSV or JSON files shown by ``dvc plots``.
        each: the section of params.yaml whose every entry is a stage of its own (``foreach`` in dvc.yaml); ``${key}``
            in the other fields stands for the entry's name, ``${item.FIELD}`` for what it says.
    """

    name: str
    help: str
    params: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    each: str | None = None

    def of(self, key: str) -> Stage:
        """The stage of one entry."""

        def filled(names: tuple[str, ...]) -> tuple[str, ...]:
            own = f"${{{self.each}.{key}."
            return tuple(name.replace("${key}", key).replace("${item.", own) for name in names)

        return replace(
            self,
            name=f"{self.name}@{key}",
            params=filled(self.params),
            deps=filled(self.deps),
            outs=filled(self.outs),
            metrics=filled(self.metrics),
            plots=filled(self.plots),
            each=None,
        )

    @property
    def key(self) -> str:
        """The entry that this stage is for."""
        return self.name.partition("@")[2]

    @property
    def function(self) -> str:
        """Module and name of the function ``run(ctx: StageContext) -> None``."""
        return f"ffprune.stages.{self.name.partition('@')[0]}:run"

    @property
    def run_record(self) -> str:
        """Small cached output that names the MLflow run which made the others, and what that run knew of itself."""
        return f"metrics/runs/{self.name}.json"

    @property
    def written(self) -> tuple[str, ...]:
        """Everything that the stage writes."""
        return (*self.outs, *self.metrics, *self.plots, self.run_record)


#: The model of the section ``model``, as recipes name it.
PIPELINE_MODEL = "dense"
#: Folders of models/ that are no entry's of the section ``models``.
MODEL_FOLDERS = (PIPELINE_MODEL, "pruned", "repaired", "methods", "pulled")


def dense_model(name: str) -> str:
    """Folder of a dense model, by the name that a recipe gives it."""
    return f"models/{name}"


def facts_of(name: str) -> str:
    """What is known of a dense model and its source, by the name that a recipe gives it."""
    return DOWNLOADED if name == PIPELINE_MODEL else f"metrics/models/{name}.json"


DOWNLOADED = "metrics/download.json"
EVALUATED = "metrics/runs/evaluate.json"
DENSE = dense_model(PIPELINE_MODEL)
CALIBRATION = "data/text/calibration.txt"
VALIDATION = "data/text/validation.txt"
TEST = "data/text/test.txt"
STATS = "data/stats/inputs.safetensors"
GRAMS = "data/stats/grams"
TRACES = "data/sensitivity/traces.json"
ORDER = "data/sensitivity/order.safetensors"
CURVES = "data/sensitivity/curves.json"
LEVELS = "data/levels"
LATENCY = "data/latency/table.json"
SEARCH_POLICY = "data/search/policy.json"
SEARCH_AGENT = "data/search/agent.safetensors"
SEARCH_EPISODES = "data/search/episodes.csv"
TRANSFER_POLICY = "data/transfer/policy.json"
TRANSFER_AGENT = "data/transfer/agent.safetensors"
TRANSFER_EPISODES = "data/transfer/episodes.csv"
POLICIES = "data/prune/policies.json"
PRUNED = "models/pruned"
REPAIRED = "models/repaired"
EVALUATION = "metrics/evaluation.json"
SUMMARY = "metrics/summary.json"
RESULTS = "metrics/results.json"
FIGURES = "reports/figures"
PAGE = "reports/report.html"
DECISION = "data/decisions/${key}.json"

_SEARCHED_WITH = (DENSE, VALIDATION, GRAMS, TRACES, ORDER, CURVES, LEVELS, LATENCY)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="download",
        help="Fetch the dense model and the text; split the text by article.",
        params=("model", "data"),
        deps=(),
        outs=(DENSE, CALIBRATION, VALIDATION, TEST, DOWNLOADED),
    ),
    Stage(
        name="calibrate",
        help="Stream input statistics of every prunable linear layer.",
        params=("calibrate", "compute", "seed"),
        deps=(DENSE, CALIBRATION),
        outs=(STATS, GRAMS),
    ),
    Stage(
        name="sensitivity",
        help="Measure the Hessian trace of every weight matrix and the loss curve of every unit.",
        params=("units", "sensitivity", "compute", "seed"),
        deps=(DENSE, CALIBRATION, GRAMS),
        outs=(TRACES, ORDER, CURVES),
    ),
    Stage(
        name="levels",
        help="Repair every unit's last linear map at many retentions: the bank that search trials read.",
        params=("units", "levels", "compute"),
        deps=(DENSE, GRAMS, ORDER),
        outs=(LEVELS,),
    ),
    Stage(
        name="latency",
        help="Time the model's blocks at several widths, if the budget is latency: the table that it is counted in.",
        params=("units", "latency", "search.budget", "compute"),
        deps=(DENSE,),
        outs=(LATENCY,),
    ),
    Stage(
        name="search",
        help="Search the policy at the first sparsity with PPO.",
        params=("units", "levels", "search", "compute", "seed"),
        deps=_SEARCHED_WITH,
        outs=(SEARCH_POLICY, SEARCH_AGENT),
        plots=(SEARCH_EPISODES,),
    ),
    Stage(
        name="transfer",
        help="Continue the trained agent at the next sparsity.",
        params=("units", "levels", "search", "transfer", "compute", "seed"),
        deps=(*_SEARCHED_WITH, SEARCH_POLICY, SEARCH_AGENT),
        outs=(TRANSFER_POLICY, TRANSFER_AGENT),
        plots=(TRANSFER_EPISODES,),
    ),
    Stage(
        name="prune",
        help="Cut the policies out of the dense model: physically smaller tensors.",
        params=("units", "prune", "compute"),
        deps=(DENSE, ORDER, SEARCH_POLICY, TRANSFER_POLICY),
        outs=(PRUNED, POLICIES),
    ),
    Stage(
        name="ridge",
        help="Repair what is left by ridge regression.",
        params=("units", "ridge", "compute", "seed"),
        deps=(PRUNED, DENSE, CALIBRATION, ORDER, GRAMS),
        outs=(REPAIRED,),
    ),
    Stage(
        name="evaluate",
        help="Measure perplexity, size, speed and zero-shot tasks against the dense model.",
        params=("evaluate", "compute", "seed"),
        deps=(DENSE, PRUNED, REPAIRED, "${evaluate.text}", "${evaluate.zero_shot.data}"),
        outs=(EVALUATION,),
    ),
    Stage(
        name="report",
        help="Write the summary, the tables and the figures, and a page with all of them.",
        # What the page shows it must be made again for.
        params=(
            "seed",
            # Field by field: who declares the section runs a model, and takes a device.
            "compute.device",
            "compute.dtype",
            "compute.device_map",
            "compute.onload",
            "compute.threads",
            "compute.matmul_precision",
            "model",
            "data",
            "units",
            "calibrate",
            "sensitivity",
            "levels",
            "latency",
            "search",
            "transfer",
            "prune",
            "ridge",
            "evaluate",
            "report",
        ),
        deps=(
            DOWNLOADED,
            EVALUATION,
            EVALUATED,
            TRACES,
            CURVES,
            SEARCH_POLICY,
            SEARCH_EPISODES,
            TRANSFER_POLICY,
            TRANSFER_EPISODES,
            POLICIES,
        ),
        outs=(FIGURES, PAGE),
        metrics=(RESULTS,),
        plots=(SUMMARY,),
    ),
)

#: A stage for every entry of the section ``models``, beside the pipeline.
FETCH = Stage(
    name="fetch",
    help="Fetch one more dense model, of the section `models`.",
    params=("models.${key}",),
    deps=(),
    outs=(dense_model("${key}"), facts_of("${key}")),
    each="models",
)
#: Two stages for every entry of the section ``methods``, beside the pipeline.
DECIDE = Stage(
    name="decide",
    help="Decide how much of every unit stays in one method of the section `methods`.",
    # What is only measured or kept is not among these: no search is made again for another text or task.
    params=(
        *(
            f"methods.${{key}}.{field}"
            for field in (
                "model",
                "sparsity",
                "allocator",
                "compressor",
                "criterion",
                "repair",
                "pattern",
                "tokens",
                "calibration_windows",
                "quantize",
                "trials",
                "first",
            )
        ),
        "study.calibration",
        "study.damping",
        "study.min_keep",
        "study.owl_multiple",
        "study.owl_half_width",
        "study.rank_half_width",
        "study.fisher",
        "study.hutchinson",
        "study.search",
        "compute",
        "seed",
    ),
    deps=(dense_model("${item.model}"), CALIBRATION, VALIDATION),
    outs=(DECISION,),
    each="methods",
)
METHOD = Stage(
    name="method",
    help="Prune and measure one method of the section `methods`.",
    params=(
        "methods.${key}",
        "study.calibration",
        "study.texts",
        "study.windows",
        "study.seqlen",
        "study.batch_size",
        "study.damping",
        "study.zero_shot",
        "study.speed",
        "compute",
        "seed",
    ),
    deps=(dense_model("${item.model}"), CALIBRATION, DECISION, "${study.texts}", "${study.zero_shot.data}"),
    outs=("models/methods/${key}",),
    metrics=("metrics/methods/${key}.json",),
    each="methods",
)
#: Stages of which there is one for every entry of a section.
ENTRIES = (FETCH, DECIDE, METHOD)


def fetches(name: str) -> bool:
    """Whether a stage brings a dense model here."""
    return name.partition("@")[0] in ("download", FETCH.name)


def computes(name: str) -> bool:
    """Whether a stage works on ``compute.device``; ``name`` may be that of an entry (``method@NAME``)."""
    kind = name.partition("@")[0]
    return any(stage.name == kind and "compute" in stage.params for stage in (*STAGES, *ENTRIES))


def stage_named(name: str) -> Stage:
    """The record of a stage."""
    return next(stage for stage in STAGES if stage.name == name)


def covers(declared: str, path: PurePath) -> bool:
    """Whether ``path`` is ``declared`` or lies inside it."""
    return path == PurePath(declared) or PurePath(declared) in path.parents


def maker_of(path: Path) -> str | None:
    """Name of the stage that writes ``path`` (relative to the workspace), if any does."""
    relative = path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path
    # An entry's files bear its name, with or without an ending.
    entries = [stage.of(key) for stage in ENTRIES for key in (relative.stem, *relative.parts)]
    entries = [entry for entry in entries if entry.outs[0] not in map(dense_model, MODEL_FOLDERS)]
    return next((s.name for s in (*STAGES, *entries) if any(covers(out, relative) for out in s.written)), None)
