"""Every allocator and compressor as the stages `decide` and `method` of a tiny project; what cannot work is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ffprune.allocate.guided import Guidance
from ffprune.allocate.table import ALLOCATORS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.errors import FfpruneError, MissingInput, ParameterError, UnreachableSparsity, UnsupportedArchitecture
from ffprune.core.outcome import Outcome, Samples
from ffprune.core.units import Allocation
from ffprune.evaluate.perplexity import perplexity
from ffprune.evaluate.reward import ModelReward
from ffprune.models.checkpoint import load_model
from ffprune.models.surgery import param_count
from ffprune.stages.context import Nowhere, Sink, StageContext
from ffprune.stages.inputs import sample_windows
from ffprune.stages.record import DECIDE, METHOD, TEST, stage_named
from ffprune.stages.run import call
from ffprune.stages.sections import Params
from tests.stages.tiny_project import MODELS, params, seen_bars, write_sources
from tests.tiny import mixtral, opt

pytestmark = pytest.mark.slow

NULLS = dict.fromkeys(("criterion", "repair", "pattern", "calibration_windows", "quantize", "trials", "first"))
PLAIN = {
    "model": "dense",
    "allocator": "uniform",
    "inputs": "pruned",
    "tokens": "equal",
    **dict.fromkeys(("zero_shot", "speed", "save"), False),
}


def recipe(compressor: str, sparsity: float, **parts: Any) -> dict[str, Any]:
    label = f"{parts.get('allocator', 'uniform')} {compressor}"
    return {**NULLS, **PLAIN, "label": label, "compressor": compressor, "sparsity": sparsity, **parts}


def searching(allocator: str, **parts: Any) -> dict[str, Any]:
    criterion = {"slice": "wanda_column", "mask": "wanda"}[parts.get("compressor", "slice")]
    given = {"compressor": "slice", "sparsity": 0.4, "criterion": criterion, "trials": 16, **parts}
    return recipe(given.pop("compressor"), given.pop("sparsity"), allocator=allocator, **given)


RECIPES: dict[str, dict[str, Any]] = {
    "dense": recipe("none", 0.0),
    "gptq": recipe("none", 0.0, quantize={"bits": 4, "group_size": 8}),
    "magnitude": recipe("mask", 0.5, criterion="magnitude"),
    "wanda": recipe("mask", 0.5, criterion="wanda", inputs="dense"),
    "two-of-four": recipe("sparsegpt", 0.5, criterion="isc", pattern="2:4"),
    "owl": recipe("mask", 0.6, allocator="owl", criterion="wanda"),
    "besa": recipe("mask", 0.5, allocator="besa", criterion="wanda"),
    "mixed": recipe("sparsegpt", 0.5, allocator="trace_rank", criterion="isc", quantize={"bits": 4, "group_size": 8}),
    "mixed-layer": recipe("sparsegpt", 0.5, allocator="trace_rank_layer", criterion="obs"),
    "dynamic-weights": recipe("mask", 0.6, allocator="dynamic_programming", criterion="wanda"),
    "dynamic": recipe(
        "slice", 0.4, allocator="dynamic_programming", criterion="compensated_elimination", repair="ridge"
    ),
    "handmade": recipe("slice", 0.2, allocator="handmade", criterion="activation_norm", repair="mean+ridge"),
    "flap": recipe("slice", 0.4, allocator="flap", criterion="flap", repair="bias", inputs="dense"),
    "slicegpt": recipe("slicegpt", 0.5),
    "svd": recipe("svd_llm", 0.5),
    "fastforward": searching("fastforward", repair="ridge", speed=True),
    "sparsitysolver": searching("sparsitysolver", compressor="mask", sparsity=0.6),
    "warm": searching("warm", compressor="mask", sparsity=0.6),
    "guided": searching("guided", repair="stream"),
    "guided-masks": searching("guided", compressor="mask", sparsity=0.6),
    "transfer-up": searching("warm", repair="ridge", first={"sparsity": 0.3, "trials": 16}),
    "transfer-down": searching("fastforward", sparsity=0.3, first={"sparsity": 0.4, "trials": 15}, zero_shot=True),
    "amc": searching("amc"),
    "eas": searching("eas"),
    "evopress": searching("evopress", trials=24),
}


def values(name: str, entry: dict[str, Any], **changes: Any) -> Params:
    return params(methods={name: entry}, **changes)


def run_method(name: str, entry: dict[str, Any], sink: Sink | None = None, **changes: Any) -> dict[str, Any]:
    for stage in (DECIDE.of(name), METHOD.of(name)):
        call(stage, StageContext(stage, values(name, entry, **changes), sink))
    found: dict[str, Any] = json.loads(Path(stage.metrics[0]).read_text())
    return found


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    roots = {}
    for name, build in {**MODELS, "opt-projected": lambda: opt(projected=True)}.items():
        roots[name] = tmp_path_factory.mktemp(name)
        write_sources(roots[name], build())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(roots[name])
            stage = stage_named("download")
            call(stage, StageContext(stage, params()))
    return roots


@pytest.fixture(autouse=True)
def _few_imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    """For four units 64 imagined episodes a round are plenty; a thousand take a minute."""
    around = Guidance.around
    monkeypatch.setattr(Guidance, "around", lambda asked: dataclasses.replace(around(asked), imagined=64))


@pytest.fixture(params=MODELS)
def project(request: pytest.FixtureRequest, projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(projects[request.param])
    return projects[request.param]


@pytest.mark.parametrize("name", ["two-of-four", "owl", "besa", "flap", "svd", "fastforward"])
def test_with_blocks_taking_turns_a_method_finds_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(Path(), MODELS["llama"]())
    stored = {"storage_dtype": "float16"}
    download = stage_named("download")
    call(download, StageContext(download, params(model=stored)))
    whole, turns = (
        run_method(name, RECIPES[name], model=stored, compute={"onload": onload}) for onload in ("model", "block")
    )
    assert turns["params_after"] == whole["params_after"]
    # A pruned block rests in the number format that it is stored in.
    wanted = whole["perplexity"]["test"]["value"]
    assert turns["perplexity"]["test"]["value"] == pytest.approx(wanted, rel=5e-4)


def test_what_takes_long_shows_how_far_it_is(projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(projects["llama"])
    bars = seen_bars(monkeypatch)

    def asked(model: Any, tokenizer: Any, text: Any, tasks: Any, seed: int, told: Any) -> dict[str, Any]:
        told(2, 2)
        return {"toy": {"acc": 1.0}}

    monkeypatch.setattr("ffprune.stages.method.ask", asked)
    name = "transfer-down"
    run_method(name, RECIPES[name] | {"speed": True})
    shown = [bar.description for bar in bars]
    first, last = shown.index("prune transfer-down"), len(shown)
    assert shown[first + 1 : last] == [
        "perplexity transfer-down on test, windows",
        "zero-shot transfer-down, requests",
        "speed transfer-down, turns",
    ]
    assert [bar.total for bar in bars[first + 1 :]] == [4, 2, 2]
    # The first search and the second, each with a race; the trials of the second go on counting.
    races = [bar for bar in bars if bar.description == "search transfer-down, samples of candidates"]
    trials = [bar for bar in bars if bar.description == "search transfer-down"]
    assert len(races) >= 2
    assert all(bar._done == bar.total > 0 for bar in races)
    assert trials[-1]._done >= trials[-1].total > trials[0]._done


@pytest.mark.parametrize("name", ["gptq", "two-of-four", "mixed", "dynamic", "guided"])
def test_a_model_that_is_kept_measures_alike(project: Path, name: str) -> None:
    folder = Path(METHOD.of(name).outs[0])
    found = run_method(name, {**RECIPES[name], "save": True}, compute={"dtype": "float32"})
    model = load_model(folder)
    windows = sample_windows(folder, Path(TEST), 24, 4, found["seed"], "windows")
    assert perplexity(model, windows, 2).value == pytest.approx(found["perplexity"]["test"]["value"], rel=1e-3)
    assert param_count(model) == found["params_after"] or found["granularity"] != "structured"
    run_method(name, RECIPES[name])
    assert list(folder.iterdir()) == []


def test_every_row_of_both_tables_is_run_here() -> None:
    assert {entry["allocator"] for entry in RECIPES.values()} == set(ALLOCATORS)
    assert {entry["compressor"] for entry in RECIPES.values()} == set(COMPRESSORS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_method_meets_its_budget_and_reports(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = RECIPES[name]
    # The tiny text has no sentences to make a task of; tests/evaluate asks real tasks.
    monkeypatch.setattr("ffprune.stages.method.ask", lambda model, *given: {"toy": {"acc": 1.0}})
    found = run_method(name, entry)
    perplexity = found["perplexity"]["test"]
    assert perplexity["value"] is None or math.isfinite(perplexity["value"])
    assert perplexity["tokens"] == 4 * 23
    assert found["recipe"] == entry
    assert found["params_before"] - found["params_after"] == found["prunable_before"] - found["prunable_after"] or (
        entry["compressor"] in ("slicegpt", "slice")  # shortcuts and biases besides
    )
    if entry["compressor"] == "slice":
        # The smallest granule: one FFN channel. SparsitySolver's mapping may prune more than asked.
        channel = min(row["params_per_granule"] for row in found["policy"])
        surplus = found["sparsity"] - entry["sparsity"]
        assert -1e-12 <= surplus < channel / found["prunable_before"] or entry["allocator"] == "sparsitysolver"
    if COMPRESSORS[entry["compressor"]].granularity == "unstructured":
        surplus = found["prunable_before"] * (found["sparsity"] - entry["sparsity"])
        assert -1e-6 <= surplus < 1 or entry["allocator"] == "sparsitysolver"
    assert found["trials"] == len(found["episodes"])
    assert bool(found["trials"]) == ALLOCATORS[entry["allocator"]].searches
    assert bool(found["zero_shot"]) == entry["zero_shot"]
    assert bool(found["speed"]) == entry["speed"]
    if entry["quantize"]:
        assert found["compression"] == pytest.approx(4 / (1 - found["sparsity"]))
    assert set(found["seconds"]) == {"decide", "prune", "evaluate"}


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sources(Path(), mixtral())
    stage = stage_named("download")
    call(stage, StageContext(stage, params()))
    return tmp_path


def test_experts_lose_channels_by_every_way_that_they_can(experts: Path) -> None:
    for name in ("dense", "dynamic", "flap", "fastforward", "evopress"):
        found = run_method(name, RECIPES[name])
        assert math.isfinite(found["perplexity"]["test"]["value"])
        if name != "dense":
            channel = min(row["params_per_granule"] for row in found["policy"])
            assert 0 <= found["sparsity"] - RECIPES[name]["sparsity"] < channel / found["prunable_before"]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wanda", "the compressor mask"),
        ("two-of-four", "the compressor sparsegpt"),
        ("svd", "the compressor svd_llm"),
        ("gptq", "the compressor none with quantize"),
        ("slicegpt", "the compressor slicegpt"),
        ("handmade", r"the repair mean\+ridge"),
        ("guided", "the repair stream"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_any_work(experts: Path, name: str, asked: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=asked):
        run_method(name, RECIPES[name])
    if COMPRESSORS[RECIPES[name]["compressor"]].has_units:
        assert not Path(DECIDE.of(name).outs[0]).exists()


def test_the_same_seed_gives_the_same_result(project: Path) -> None:
    for name in ("warm", "evopress", "besa"):
        first, again = (run_method(name, RECIPES[name]) for _ in range(2))
        for key in ("policy", "perplexity", "episodes"):
            assert first[key] == again[key], (name, key)


class Watched(Nowhere):
    """A sink that kills the stage at a trial, and remembers the trials it was told of."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.trials = die_at, list[int]()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if "reward" in values:
            self.trials.append(step)
            if step == self.die_at:
                raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["amc", "eas", "evopress"])
def test_a_killed_search_goes_on_and_another_seed_begins_anew(
    projects: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(projects["llama"])
    asked: list[int] = []
    score = ModelReward.__call__

    def counted(reward: ModelReward, allocation: Allocation, samples: Samples) -> Outcome:
        asked.append(samples.count)
        return score(reward, allocation, samples)

    monkeypatch.setattr(ModelReward, "__call__", counted)

    def run(die_at: int | None = None, seed: int = 0) -> tuple[dict[str, Any], list[int], int]:
        """The stage's result, the trials it told of, and how often it asked the pruned model."""
        asked.clear()
        sink, found = Watched(die_at), {}
        with pytest.raises(KeyboardInterrupt) if die_at is not None else nullcontext():
            found = run_method(name, RECIPES[name], sink, seed=seed)
        return found, sink.trials, len(asked)

    whole, told, total = run()
    other, _, other_total = run(seed=1)
    run(die_at=7)
    again, _, anew = run(seed=1)  # beside what the killed run left
    assert anew == other_total
    # A finished stage takes all its checkpoints away: the kill comes once more.
    _, _, spent = run(die_at=7)
    resumed, told_again, left = run()
    assert (spent + left, told_again) == (total, told)
    for key in ("policy", "perplexity", "episodes", "policies", "facts"):
        assert resumed[key] == whole[key], key
        assert again[key] == other[key], key


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (recipe("mask", 0.5, criterion="wnda"), ["wnda", "magnitude, wanda"]),
        (recipe("msk", 0.5), ["msk", "sparsegpt"]),
        (recipe("slice", 0.5, criterion="wanda_column", pattern="2:4"), ["pattern", "single weights"]),
        (recipe("slice", 0.5, criterion="wanda_column", allocator="owl"), ["owl", "structured", "fastforward"]),
        (recipe("mask", 0.5, criterion="wanda", allocator="flap"), ["flap", "unstructured", "trace_rank"]),
        (recipe("slicegpt", 0.5, allocator="flap"), ["slicegpt has no units", "uniform"]),
        (recipe("svd_llm", 0.5, quantize={"bits": 4, "group_size": 8}), ["quantize", "sparsegpt"]),
        (recipe("mask", 0.5), ["criterion is null", "wanda"]),
        (recipe("mask", 0.5, criterion="wanda", repair="ridge"), ["repair", "null"]),
        (recipe("mask", 0.5, criterion="wanda", allocator="eas"), ["trials", "number"]),
        (recipe("mask", 0.5, criterion="wanda", trials=4), ["trials", "null"]),
        (searching("eas", first={"sparsity": 0.2, "trials": 4}), ["first", "fastforward"]),
        (recipe("slice", 0.3, criterion="flap", allocator="dynamic_programming"), ["flap", "wanda_column"]),
        (recipe("none", 0.5), ["sparsity 0.5", "removes nothing"]),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], said: list[str]
) -> None:
    monkeypatch.chdir(projects["llama"])
    monkeypatch.setattr("ffprune.stages.decide.load", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(ParameterError) as caught:
        run_method("wrong", entry)
    assert all(word in str(caught.value) for word in said), str(caught.value)


@pytest.mark.parametrize(
    ("project_name", "entry", "kind", "said"),
    [
        ("opt-projected", recipe("slicegpt", 0.5), UnsupportedArchitecture, "do_layer_norm_before"),
        ("llama", recipe("slice", 0.97, criterion="wanda_column"), UnreachableSparsity, "reach"),
        ("llama", {**RECIPES["flap"], "save": True}, ParameterError, "repair bias.*have none.*save to false"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_work(
    projects: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    project_name: str,
    entry: dict[str, Any],
    kind: type[FfpruneError],
    said: str,
) -> None:
    monkeypatch.chdir(projects[project_name])
    with pytest.raises(kind, match=said):
        run_method("wrong", entry)
    assert not Path("metrics/methods/wrong.json").exists()


def test_what_is_only_measured_makes_no_search_again(projects: dict[str, Path]) -> None:
    entry, other = RECIPES["fastforward"], RECIPES["fastforward"] | {"zero_shot": True, "save": True, "label": "other"}
    stages = DECIDE.of("x"), METHOD.of("x")
    changed = {"text": "elsewhere.txt"}
    for stage, same in zip(stages, (True, False), strict=True):
        before = StageContext(stage, values("x", entry)).param_values
        assert (before == StageContext(stage, values("x", other)).param_values) is same
        assert (before == StageContext(stage, values("x", entry, study={"texts": changed})).param_values) is same
        assert before != StageContext(stage, values("x", entry | {"sparsity": 0.3})).param_values


def test_a_method_that_was_not_decided_says_what_is_missing(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(projects["llama"])
    stage = METHOD.of("undecided")
    with pytest.raises(MissingInput, match=r"decisions/undecided\.json.*decide@undecided"):
        call(stage, StageContext(stage, values("undecided", RECIPES["wanda"])))


def test_one_decision_can_be_cut_and_measured_in_several_ways(
    projects: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(projects["llama"])
    first = run_method("eas", RECIPES["eas"])
    stage = METHOD.of("eas")
    call(stage, StageContext(stage, values("eas", RECIPES["eas"] | {"speed": True})))
    again = json.loads(Path(stage.metrics[0]).read_text())
    assert again["speed"]
    for key in ("policy", "episodes", "perplexity"):
        assert again[key] == first[key]
    assert again["seconds"]["decide"] == json.loads(Path(DECIDE.of("eas").outs[0]).read_text())["seconds"]
