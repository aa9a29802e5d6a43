"""What may be written in params.yaml: one model per section, gathered in :class:`Params`.

Fields have no defaults: DVC sees only what params.yaml says, so a default in code would be a parameter whose
change reruns no stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ffprune.allocate.guidance import Guidance
from ffprune.core.budget import Bounds
from ffprune.core.errors import FfpruneError
from ffprune.core.schedule import Schedule
from ffprune.sources.base import ModelParams, TextParams
from ffprune.stages.record import MODEL_FOLDERS, PIPELINE_MODEL


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@contextmanager
def _telling() -> Iterator[None]:
    """What is made of a section checks itself; its refusal is told with all else that is wrong in the file."""
    try:
        yield
    except FfpruneError as refusal:
        raise ValueError(str(refusal).rstrip(".")) from refusal


# The kinds of torch.device that models are computed on.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")


class Compute(Section):
    """Where and how precisely tensors are computed."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device_map: Literal["auto"] | None
    onload: Literal["model", "block"]
    threads: int = Field(ge=0)
    matmul_precision: Literal["highest", "high", "medium"]

    @field_validator("device")
    @classmethod
    def _a_kind_of_device(cls, given: str) -> str:
        # By their names, since importing torch to ask takes a second. Whether this machine has it: ffprune doctor.
        if not re.fullmatch(rf"({'|'.join(_DEVICES)})(:(0|[1-9][0-9]*))?", given):
            raise ValueError(f"a torch device is asked for: one of {', '.join(_DEVICES)}, with a number as in cuda:0")
        return given

    @model_validator(mode="after")
    def _one_way_to_be_larger(self) -> Self:
        if self.device_map is not None and self.onload == "block":
            raise ValueError(
                f"device_map {self.device_map} spreads the blocks over all devices, onload block lets them take turns "
                "on one: set device_map to null or onload to model"
            )
        return self


class Tracking(Section):
    """Where runs are recorded. No stage declares it: it never changes a result."""

    experiment: str = Field(min_length=1)
    uri: str | None


class Workers(Section):
    """Processes that try policies side by side. No stage declares it: it never changes a result."""

    count: int = Field(ge=0)
    address: str | None = Field(min_length=1)
    gpus: float = Field(ge=0)

    @model_validator(mode="after")
    def _whole_or_a_share(self) -> Self:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus:g} is neither a share of one GPU nor a number of whole ones")
        return self


class Calibrate(Section):
    """Input statistics."""

    windows: int = Field(ge=1)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)


class Fisher(Section):
    """Curvature of the loss in every unit's output."""

    windows: int = Field(ge=2)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)


class Hutchinson(Section):
    """Hessian trace of every weight matrix."""

    probes: int = Field(ge=2)
    windows: int = Field(ge=1)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    product: Literal["exact", "finite_difference"]


Criterion = Literal["compensated_elimination", "wanda_column", "activation_norm"]


class Sensitivity(Section):
    """Which granule goes first in a unit, and how much every matrix and unit matters."""

    criterion: Criterion
    plain_criterion: Criterion
    damping: float = Field(gt=0)
    fisher: Fisher
    hutchinson: Hutchinson


class LevelsParams(Section):
    """The bank of repaired last maps that search trials read."""

    damping: float = Field(gt=0)
    min_keep: float = Field(ge=0, le=1)
    step: int = Field(ge=1)
    gigabytes: float = Field(ge=0)


class LatencyParams(Section):
    """Block times of the dense model, for a budget of latency."""

    phase: Literal["prefill", "decode"]
    tokens: int = Field(ge=1)
    batch: int = Field(ge=1)
    widths: int = Field(ge=1)
    repeats: int = Field(ge=1)


class ScheduleParams(Section):
    """The progressive schedule (FF Eq. 3), in episodes of a search of 3000; scaled to the real length."""

    alpha_start: float
    k: float
    t0: float

    def printed(self) -> Schedule:
        """The schedule as it is written."""
        return Schedule(self.alpha_start, self.k, self.t0)

    def scaled(self, episodes: int) -> Schedule:
        """The schedule of a search of that many episodes."""
        return Schedule.scaled(self.alpha_start, self.k, self.t0, episodes=episodes)

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        with _telling():
            self.printed()
        return self


class Guide(Section):
    """How a guided search chooses its trials: :class:`ffprune.allocate.guidance.Guidance`, field by field."""

    low: float
    high: float
    imagined: int
    batch: int
    proposals: int

    def guidance(self) -> Guidance:
        """What the search takes."""
        return Guidance(**self.model_dump())

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        with _telling():
            self.guidance()
        return self


class Bounded(Section):
    """A section that bounds retentions."""

    min_keep: float

    def bounds(self) -> Bounds:
        """Least and greatest retention of a unit."""
        return Bounds(self.min_keep, 1.0)

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        with _telling():
            self.bounds()
        return self


class Trials(Section):
    """What a search spends on its trials and their comparison."""

    seqlen: int = Field(ge=2)
    samples: int = Field(ge=1)
    final_samples: int = Field(ge=1)
    finalists: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    threads: int = Field(ge=0)
    step: int = Field(ge=1)
    schedule: ScheduleParams


class Search(Trials, Bounded):
    """The search at the first sparsity; transfer reads it too."""

    sparsity: float = Field(ge=0, lt=1)
    budget: Literal["parameters", "macs", "latency"]
    context: int = Field(ge=1)
    episodes: int = Field(ge=1)
    agent: Literal["guided", "warm", "fastforward", "sparsitysolver"]
    mapping: Literal["water_fill", "greedy_fill", "sequential_cap"]
    reward: Literal["divergence", "perplexity_ratio", "inverse_perplexity"]
    compensated: bool
    max_keep: float
    rank_half_width: float = Field(ge=0, le=0.5)
    guide: Guide

    def bounds(self) -> Bounds:
        """Least and greatest retention of a unit."""
        return Bounds(self.min_keep, self.max_keep)


class Transfer(Section):
    """Policy transfer to the next sparsity."""

    sparsity: float = Field(ge=0, lt=1)
    episodes: int = Field(ge=0)
    schedule: ScheduleParams


Policy = Literal["uniform", "handmade", "searched"]


class Prune(Bounded):
    """What is cut."""

    policies: tuple[Policy, ...] = Field(min_length=1)


class Ridge(Section):
    """The repair."""

    repairs: dict[Literal["ridge", "stream"], tuple[Policy, ...]]
    damping: float = Field(gt=0)
    absolute: bool
    stream: Calibrate


class Speed(Section):
    """Prefill and decode speed."""

    prefill_tokens: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)


class Tasks(Section):
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...]
    include_path: str | None
    data: str = Field(min_length=1)
    items: int = Field(ge=1)
    limit: int | None = Field(ge=1)
    batch_size: int = Field(ge=1)


class ZeroShot(Tasks):
    """Tasks, and which models are asked besides the dense one."""

    methods: tuple[str, ...]


class Evaluate(Section):
    """What is measured, and on what."""

    text: str
    windows: int = Field(ge=0)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    methods: tuple[str, ...] = Field(min_length=1)
    speed: Speed
    zero_shot: ZeroShot


class Study(Bounded):
    """What all methods of a study share: text, protocol, damping."""

    calibration: Calibrate
    texts: dict[str, str] = Field(min_length=1)
    windows: int = Field(ge=0)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    damping: float = Field(gt=0)
    owl_multiple: float = Field(gt=0)
    owl_half_width: float = Field(ge=0, le=0.5)
    rank_half_width: float = Field(ge=0, le=0.5)
    fisher: Fisher
    hutchinson: Hutchinson
    search: Trials
    zero_shot: Tasks
    speed: Speed


class QuantiseParams(Section):
    """GPTQ after pruning."""

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=1)


class First(Section):
    """The search that comes before a policy transfer."""

    sparsity: float = Field(gt=0, lt=1)
    trials: int = Field(ge=1)


class Recipe(Section):
    """One method of a study. null: not used. `ffprune methods` lists the names and what goes with what."""

    label: str = Field(min_length=1)
    model: str
    sparsity: float = Field(ge=0, lt=1)
    allocator: str
    compressor: str
    criterion: str | None
    repair: str | None
    pattern: str | None
    inputs: Literal["pruned", "dense"]
    tokens: Literal["equal", "weighted"]
    calibration_windows: int | None = Field(ge=1)
    quantize: QuantiseParams | None
    trials: int | None = Field(ge=1)
    first: First | None
    zero_shot: bool
    speed: bool
    save: bool

    @model_validator(mode="after")
    def _transfer_goes_elsewhere(self) -> Self:
        if self.first is not None and self.first.sparsity == self.sparsity:
            raise ValueError("sparsity and first.sparsity are the same: change one of them, or set first to null")
        return self


class Report(Section):
    """How figures are drawn."""

    dpi: int = Field(ge=50)


class Units(Section):
    """What the pipeline prunes."""

    heads: Literal["group", "query"]


#: Of an entry: a file name, and part of the name of its stages.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Params(Section):
    """The whole of params.yaml. Checks that span sections belong in a ``model_validator`` here."""

    seed: int = Field(ge=0)
    compute: Compute
    tracking: Tracking
    workers: Workers
    model: ModelParams
    data: TextParams
    units: Units
    calibrate: Calibrate
    sensitivity: Sensitivity
    levels: LevelsParams
    latency: LatencyParams
    search: Search
    transfer: Transfer
    prune: Prune
    ridge: Ridge
    evaluate: Evaluate
    report: Report
    study: Study
    models: dict[Name, ModelParams]
    methods: dict[Name, Recipe]

    @model_validator(mode="after")
    def _workers_have_their_device(self) -> Self:
        if not self.workers.count:
            return self
        device, gpus = self.compute.device, self.workers.gpus
        if ":" in device:
            raise ValueError(
                f"compute.device {device} is one device, and Ray gives every worker devices of its own: "
                f"set compute.device to {device.partition(':')[0]}"
            )
        if (device == "cuda") != (gpus > 0):
            raise ValueError(
                f"workers with {gpus:g} GPUs each cannot compute on compute.device {device}: "
                f"set workers.gpus {'above 0, such as 1 or 0.5' if device == 'cuda' else 'to 0'}"
            )
        return self

    @model_validator(mode="after")
    def _models_have_folders_of_their_own(self) -> Self:
        if taken := sorted(set(self.models) & set(MODEL_FOLDERS)):
            raise ValueError(
                f"models has the names {taken}, and in the folder models/ {', '.join(MODEL_FOLDERS)} are folders of "
                "other stages: give these entries other names"
            )
        return self

    @model_validator(mode="after")
    def _methods_have_their_model(self) -> Self:
        known = (PIPELINE_MODEL, *self.models)
        for name, recipe in self.methods.items():
            if recipe.model not in known:
                raise ValueError(
                    f"methods.{name}.model {recipe.model!r} is no model; known are {', '.join(known)} "
                    f"({PIPELINE_MODEL}: that of the section model): name one of them, or add it to the section models"
                )
        return self

    @model_validator(mode="after")
    def _one_policy_per_sparsity(self) -> Self:
        if self.search.sparsity == self.transfer.sparsity:
            raise ValueError("search.sparsity and transfer.sparsity are the same: change one of them")
        return self

    @model_validator(mode="after")
    def _within_reach(self) -> Self:
        # The model's granules can only narrow this; `ffprune params check`, once the model is there, and the search
        # before its first trial check them. Measured times follow no such rule: they are checked there alone.
        if self.search.budget == "latency":
            return self
        fuzz = 1e-9  # 1 - 0.9 is less than 0.1
        least, most = 1 - self.search.max_keep, 1 - self.search.min_keep
        for name, sparsity in (("search", self.search.sparsity), ("transfer", self.transfer.sparsity)):
            if sparsity < least - fuzz:
                raise ValueError(
                    f"{name}.sparsity {sparsity:g} is out of reach: search.max_keep {self.search.max_keep:g} "
                    f"removes at least {least:g}; raise search.max_keep or {name}.sparsity"
                )
            if sparsity > most + fuzz:
                raise ValueError(
                    f"{name}.sparsity {sparsity:g} is out of reach: search.min_keep {self.search.min_keep:g} "
                    f"allows at most {most:g}; lower search.min_keep or {name}.sparsity"
                )
        return self

    @model_validator(mode="after")
    def _measured_is_made(self) -> Self:
        repaired = {policy for policies in self.ridge.repairs.values() for policy in policies}
        if missing := sorted(str(policy) for policy in repaired - set(self.prune.policies)):
            raise ValueError(f"ridge.repairs names {missing}, which prune.policies does not make")
        made = {f"{policy}+{name}" for name, policies in self.ridge.repairs.items() for policy in policies}
        made |= set(self.prune.policies)
        if missing := sorted(set(self.evaluate.methods) - made):
            raise ValueError(f"evaluate.methods names {missing}; prune.policies and ridge.repairs make {sorted(made)}")
        if missing := sorted(set(self.evaluate.zero_shot.methods) - set(self.evaluate.methods)):
            raise ValueError(f"evaluate.zero_shot.methods names {missing}, which evaluate.methods does not measure")
        return self
