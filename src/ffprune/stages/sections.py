"""What may be written in params.yaml: one model per section, gathered in :class:`Params`.

Fields have no defaults: DVC sees only what params.yaml says, so a default in code would be a parameter whose
change reruns no stage.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ffprune.sources.base import ModelParams, TextParams


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Compute(Section):
    """Where and how precisely tensors are computed."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device_map: str | None
    threads: int = Field(ge=0)
    matmul_precision: Literal["highest", "high", "medium"]


class Tracking(Section):
    """Where runs are recorded. No stage declares it: it never changes a result."""

    experiment: str = Field(min_length=1)
    uri: str | None


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


class Sensitivity(Section):
    """Which granule goes first in a unit, and how much every matrix and unit matters."""

    criterion: str
    plain_criterion: str
    damping: float = Field(gt=0)
    fisher: Fisher
    hutchinson: Hutchinson


class LevelsParams(Section):
    """The bank of repaired last maps that search trials read."""

    damping: float = Field(gt=0)
    min_keep: float = Field(ge=0, le=1)
    step: int = Field(ge=1)
    gigabytes: float = Field(ge=0)


class ScheduleParams(Section):
    """The progressive schedule (FF Eq. 3), in episodes of a search of 3000; scaled to the real length."""

    alpha_start: float = Field(ge=0, le=1)
    k: float = Field(gt=0)
    t0: float


class Guide(Section):
    """How a guided search chooses its trials: :class:`ffprune.allocate.guided.Guidance`, field by field."""

    low: float = Field(gt=0, lt=1)
    high: float = Field(gt=0, lt=1)
    imagined: int = Field(ge=0)
    batch: int = Field(ge=2)
    proposals: int = Field(ge=0)


class Trials(Section):
    """What a search spends on its trials and their comparison."""

    seqlen: int = Field(ge=2)
    samples: int = Field(ge=1)
    final_samples: int = Field(ge=1)
    finalists: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    step: int = Field(ge=1)
    schedule: ScheduleParams


class Search(Trials):
    """The search at the first sparsity; transfer reads it too."""

    sparsity: float = Field(ge=0, lt=1)
    episodes: int = Field(ge=1)
    agent: str
    mapping: str
    reward: str
    compensated: bool
    min_keep: float = Field(ge=0, le=1)
    max_keep: float = Field(gt=0, le=1)
    rank_half_width: float = Field(ge=0, le=0.5)
    guide: Guide


class Transfer(Section):
    """Policy transfer to the next sparsity."""

    sparsity: float = Field(ge=0, lt=1)
    episodes: int = Field(ge=1)
    schedule: ScheduleParams


Policy = Literal["uniform", "handmade", "searched"]


class Prune(Section):
    """What is cut."""

    policies: tuple[Policy, ...] = Field(min_length=1)
    min_keep: float = Field(ge=0, le=1)


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


class Study(Section):
    """What all methods of a study share: text, protocol, damping."""

    calibration: Calibrate
    texts: dict[str, str] = Field(min_length=1)
    windows: int = Field(ge=0)
    seqlen: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    damping: float = Field(gt=0)
    min_keep: float = Field(ge=0, le=1)
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
    sparsity: float = Field(ge=0, lt=1)
    allocator: str
    compressor: str
    criterion: str | None
    repair: str | None
    pattern: str | None
    inputs: Literal["pruned", "dense"]
    calibration_windows: int | None = Field(ge=1)
    quantize: QuantiseParams | None
    trials: int | None = Field(ge=1)
    first: First | None
    zero_shot: bool
    speed: bool


class Report(Section):
    """How figures are drawn."""

    dpi: int = Field(ge=50)


class Params(Section):
    """The whole of params.yaml. Checks that span sections belong in a ``model_validator`` here."""

    seed: int = Field(ge=0)
    compute: Compute
    tracking: Tracking
    model: ModelParams
    data: TextParams
    calibrate: Calibrate
    sensitivity: Sensitivity
    levels: LevelsParams
    search: Search
    transfer: Transfer
    prune: Prune
    ridge: Ridge
    evaluate: Evaluate
    report: Report
    study: Study
    methods: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], Recipe]

    @model_validator(mode="after")
    def _one_policy_per_sparsity(self) -> Self:
        if self.search.sparsity == self.transfer.sparsity:
            raise ValueError("search.sparsity and transfer.sparsity are the same: change one of them")
        return self

    @model_validator(mode="after")
    def _within_reach(self) -> Self:
        # The model's granules can only narrow this; the search checks them before its first trial.
        most = 1 - self.search.min_keep
        for name, sparsity in (("search", self.search.sparsity), ("transfer", self.transfer.sparsity)):
            if sparsity > most:
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
        return self
