"""The whole chain on tiny random models, every stage called as a function in a temporary folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.numpy import load_file

from ffprune.core.budget import Bounds
from ffprune.core.errors import (
    FfpruneError,
    MissingInput,
    ParameterError,
    TooLittleText,
    UnreachableSparsity,
    UnsupportedArchitecture,
)
from ffprune.core.units import Allocation
from ffprune.evaluate.latency import Latencies
from ffprune.models.checkpoint import load_model
from ffprune.models.view import ModelView
from ffprune.stages import latency as latency_stage
from ffprune.stages import search_reward
from ffprune.stages.budget import Budget
from ffprune.stages.context import Nowhere, StageContext
from ffprune.stages.policy import policy_at, print_policy
from ffprune.stages.progress import Bars, Progress
from ffprune.stages.record import (
    EVALUATION,
    FIGURES,
    LEVELS,
    ORDER,
    PAGE,
    POLICIES,
    PRUNED,
    REPAIRED,
    SEARCH_AGENT,
    SEARCH_EPISODES,
    SEARCH_POLICY,
    STAGES,
    SUMMARY,
    TRANSFER_AGENT,
    TRANSFER_POLICY,
    stage_named,
)
from ffprune.stages.run import call, run_stage
from ffprune.stages.sections import Params
from tests.oracles import uneven
from tests.stages.made_up import block_times
from tests.stages.tiny_project import METHODS, MODELS, params, seen_bars, write_sources
from tests.tiny import mixtral

# Half a minute of models that are made, cut, saved and reloaded: too long for `make check`.
pytestmark = pytest.mark.slow

ROW = {
    *("method", "granularity", "sparsity_target", "sparsity", "perplexity", "dense_perplexity", "params", "bytes"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "seconds", "path"),
}
RELOAD = """
import json, math, sys, torch, ffprune
from pathlib import Path
from ffprune.stages.inputs import sample_windows
torch.set_num_threads(1)
found = {}
for root in map(Path, sys.argv[1:]):
    summary = json.loads((root / "metrics/summary.json").read_text())
    windows = sample_windows(root / "models/dense", root / "data/text/test.txt", 24, 4, 0, "evaluate.windows")
    for row in [summary["dense"], *summary["rows"]]:
        model = ffprune.load_model(root / row["path"])
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:])
        found[str(root / row["path"])] = math.exp(float(nll))
print(json.dumps(found))
"""


def run(name: str, values: Params | None = None, sink: Nowhere | None = None) -> None:
    """The third door: a stage's function, tracked nowhere."""
    stage = stage_named(name)
    call(stage, StageContext(stage, values or params(), sink or Nowhere()))


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder in which the whole chain has run."""
    torch.set_num_threads(1)  # before the fixture of every single test
    roots = {}
    for name, build in MODELS.items():
        root = roots[name] = tmp_path_factory.mktemp(name)
        write_sources(root, build())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            for stage in STAGES:
                run(stage.name)
    return roots


@pytest.fixture(scope="module")
def reloading(chains: dict[str, Path]) -> Iterator[subprocess.Popen[str]]:
    """Another process that loads every model; it starts up while other tests run."""
    command = [sys.executable, "-c", RELOAD, *map(str, chains.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture(params=MODELS)
def chain(request: pytest.FixtureRequest, chains: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one family, current; not to be changed."""
    monkeypatch.chdir(chains[request.param])
    return chains[request.param]


@pytest.fixture
def scratch(chains: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the llama's folder, current, to be changed."""
    shutil.copytree(chains["llama"], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield tmp_path / "copy"


def summary() -> dict[str, Any]:
    return json.loads(Path(SUMMARY).read_text())


def contents(root: Path) -> dict[str, str]:
    """Every file's hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def refused(kind: type[FfpruneError], stage: str, **changes: Any) -> str:
    """The refusal of a stage that must leave every file as it was."""
    before = contents(Path.cwd())
    with pytest.raises(kind) as caught:
        run(stage, params(**changes))
    after = {name: key for name, key in contents(Path.cwd()).items() if not name.startswith(".ckpt/")}
    assert after == {name: key for name, key in before.items() if not name.startswith(".ckpt/")}
    return str(caught.value)


# --- the chain ---


def test_every_declared_output_exists(chain: Path, reloading: object) -> None:
    for stage in STAGES:
        for out in (*stage.outs, *stage.metrics, *stage.plots):
            assert Path(out).exists(), f"{stage.name}: {out}"
    assert not list(Path().rglob(".*.partial"))
    assert not [path for path in Path(".ckpt").iterdir() if path.name != "sources"]


def test_the_summary_has_the_promised_rows(chain: Path) -> None:
    found = summary()
    dense = found["dense"]
    assert {"perplexity", "params", "bytes", "path"} <= set(dense)
    assert [(r["sparsity_target"], r["method"]) for r in found["rows"]] == [(s, m) for s in (0.2, 0.3) for m in METHODS]
    for row in found["rows"]:
        assert set(row) >= {*ROW, "zero_shot"}
        assert row["granularity"] == "structured"
        assert row["dense_perplexity"] == dense["perplexity"]
        assert all(row[key] > 0 for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "seconds", "perplexity"))
        assert row["path"].startswith(REPAIRED if "+" in row["method"] else PRUNED)
    table = (Path(FIGURES) / "results.md").read_text()
    for method in METHODS:
        assert f"| {method} |" in table


def test_sparsity_is_exact_and_every_model_is_physically_smaller(chain: Path) -> None:
    dense = summary()["dense"]
    for row in summary()["rows"]:
        policy = json.loads(Path(f"{row['path']}.json").read_text())
        allocation = Allocation.from_rows(policy["units"])
        channel = min(unit.params_per_granule for unit in allocation.units)
        target = row["sparsity_target"]
        assert target <= row["sparsity"] == allocation.sparsity < target + channel / allocation.prunable
        assert dense["prunable_params"] - row["prunable_params"] == allocation.removed
        # Nothing but prunable weights and, in OPT, the biases of removed rows may go.
        assert dense["params"] - row["params"] >= allocation.removed
        assert row["bytes"] < dense["bytes"]
        with safe_open(Path(row["path"]) / "model.safetensors", framework="pt") as file:
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert sum(sizes.values()) == row["params"]


def test_policies_are_what_their_names_say(chain: Path) -> None:
    for target in ("0.2", "0.3"):
        policies = {
            name: Allocation.from_rows(json.loads((Path(PRUNED) / target / f"{name}.json").read_text())["units"])
            for name in ("uniform", "handmade", "searched")
        }
        attention = [i for i, unit in enumerate(policies["handmade"].units) if unit.kind == "attention"]
        assert all(policies["handmade"].retention[i] == 1 for i in attention)
        together = [cut for cut in json.loads(Path(POLICIES).read_text()) if f"{cut['sparsity_target']:g}" == target]
        assert {cut["policy"]: Allocation.from_rows(cut["units"]) for cut in together} == policies
        path = SEARCH_POLICY if target == "0.2" else TRANSFER_POLICY
        assert policies["searched"] == Allocation.from_rows(json.loads(Path(path).read_text())["units"])


def test_repairs_help_what_they_repair_on_its_own_text(chain: Path) -> None:
    rows = {(row["sparsity_target"], row["method"]): row for row in summary()["rows"]}
    for target in (0.2, 0.3):
        for policy in ("uniform", "searched"):
            cut, mended = rows[target, policy], rows[target, f"{policy}+ridge"]
            assert cut["params"] == mended["params"]
            assert cut["perplexity"] != mended["perplexity"]


def test_the_policy_file_tells_where_the_policy_comes_from(chain: Path) -> None:
    for path, target in ((SEARCH_POLICY, 0.2), (TRANSFER_POLICY, 0.3)):
        policy = json.loads(Path(path).read_text())
        assert policy["sparsity_target"] == target
        assert policy["source"] == policy["candidates"][0]["name"]
        most = policy["candidates"][0]["tokens"]
        assert all(candidate["tokens"] <= most for candidate in policy["candidates"])
        losses = [candidate["loss"] for candidate in policy["candidates"] if candidate["tokens"] == most]
        assert losses == sorted(losses)
        assert {"dynamic programming", "trace rank", "handmade"} & {c["name"] for c in policy["candidates"]}
        assert policy["episodes"] == 8
    rows = Path(SEARCH_EPISODES).read_text().splitlines()
    assert len(rows) == 9
    with safe_open(SEARCH_AGENT, framework="pt") as first, safe_open(TRANSFER_AGENT, framework="pt") as second:
        assert set(first.keys()) == set(second.keys())
        step = "optimizer.0.step"
        # The same agent, trained further, and everything tried so far.
        assert second.get_tensor(step) > first.get_tensor(step)
        tried = len(first.get_tensor("trials.loss"))
        assert second.get_tensor("trials.loss")[:tried].equal(first.get_tensor("trials.loss"))
        assert len(second.get_tensor("trials.loss")) > tried


# --- again, with one thing changed ---


def test_the_report_says_the_same_at_every_run_and_shows_a_changed_parameter(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawn above already, and slow
    before = Path(PAGE).read_bytes()
    run("report")
    assert Path(PAGE).read_bytes() == before
    assert b"damping: 0.0625" not in before
    run("report", params(ridge={"damping": 0.0625}))
    assert b"damping: 0.0625" in Path(PAGE).read_bytes()


def test_another_damping_changes_the_repaired_models_alone(scratch: Path) -> None:
    before = contents(scratch)
    run("ridge", params(ridge={"damping": 0.5}))
    after = contents(scratch)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed
    assert {name.rsplit("/", 1)[-1] for name in changed} == {"model.safetensors"}
    # Each repair chooses its own where it can; on what is repaired for its own output the number counts.
    assert {name.split("/")[3].partition("+")[2] for name in changed} == {"ridge"}
    assert all(name.startswith(f"{REPAIRED}/") for name in changed)
    run("ridge")
    assert contents(scratch) == before


class Remembering(Nowhere):
    """A run whose metrics are kept."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.values |= values


class Killed(Nowhere):
    """A run that is killed at an episode's report."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["search", "transfer"])
def test_a_killed_search_goes_on_to_the_same_files(scratch: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounds of four trials at most: the seventh belongs to a later round than the first that was saved.
    guide = {"batch": 4, "proposals": 1}
    values = params(search={"episodes": 12, "guide": guide}, transfer={"episodes": 12})
    run(stage, values)
    outs = stage_named(stage)
    whole = contents(scratch)
    for out in (*outs.outs, *outs.plots):
        Path(out).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(stage, values, Killed())
    assert list(Path(".ckpt", stage).rglob("*.safetensors"))
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002 - SB3 uses it
    shown, at = [], Bars.at

    def spy(self: Bars, description: str, total: int, done: int = 0, anew: bool = False) -> Progress:
        if description.startswith(f"{stage} ") and total == 12:
            shown.append(done)
        return at(self, description, total, done, anew)

    monkeypatch.setattr(Bars, "at", spy)
    run(stage, values)
    assert contents(scratch) == whole
    # The bar counts from the trials that had been saved, which take no time now.
    assert shown[0] in range(1, 7)
    assert (min(shown), shown[-1]) == (shown[0] - 1, 11)


def test_with_blocks_taking_turns_every_output_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stored as float16 and computed with as float32: a block at rest is not a block at work.
    found = []
    for onload in ("model", "block"):
        (tmp_path / onload).mkdir()
        monkeypatch.chdir(tmp_path / onload)
        write_sources(Path(), MODELS["llama"]())
        given = params(compute={"onload": onload}, model={"storage_dtype": "float16"})
        for stage in STAGES:
            if stage.name != "report":
                run(stage.name, given)
        rows = json.loads(Path(EVALUATION).read_text())["rows"]
        losses = {f"{row['method']}@{row['sparsity_target']}": row["perplexity"] for row in rows}
        found.append(contents(Path("data")) | contents(Path("models")) | losses)
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_query_heads_go_and_keys_and_values_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(Path(), MODELS["llama"]())
    # FFNs alone do not reach the budget: heads must go.
    given = params(
        units={"heads": "query"},
        search={"budget": "macs", "context": 80},
        prune={"policies": ["uniform", "searched"]},
        ridge={"repairs": {"ridge": ["uniform"], "stream": ["searched"]}},
        evaluate={"methods": ["uniform", "uniform+ridge", "searched", "searched+stream"]},
    )
    for stage in STAGES:
        run(stage.name, given)
    heads = set()
    for row in summary()["rows"]:
        view = ModelView(load_model(tmp_path / row["path"], torch.float32))
        assert {block.groups for block in view.blocks} == {2}
        heads |= {block.heads for block in view.blocks}
        policy = json.loads((tmp_path / f"{row['path']}.json").read_text())
        assert [unit["kept"] for unit in policy["units"][::2]] == [block.heads_per_group for block in view.blocks]
        # A head is a tenth of this tiny model: where no channel is left to keep instead, up to one goes too many.
        assert 0 <= policy["removed"]["macs"] - policy["sparsity_target"] < 0.1
        assert policy["sparsity"] == policy["removed"]["parameters"]
    assert heads == {2, 4}
    found = {(row["sparsity_target"], row["method"]): row["perplexity"] for row in summary()["rows"]}
    assert all(found[target, "uniform+ridge"] != found[target, "uniform"] for target in (0.2, 0.3))


def test_every_expert_loses_as_many_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(Path(), mixtral())
    given: dict[str, Any] = {
        "prune": {"policies": ["uniform", "searched"]},
        "ridge": {"repairs": {"ridge": ["uniform", "searched"], "stream": []}},
        "evaluate": {
            "methods": ["uniform", "uniform+ridge", "searched", "searched+ridge"],
            "zero_shot": {"methods": []},
        },
        "search": {"budget": "macs", "context": 80},
    }
    sinks = {}
    for stage in STAGES:
        sinks[stage.name] = Remembering()
        run(stage.name, params(**given), sinks[stage.name])
    assert 0 <= sinks["calibrate"].values["unreached_experts"] < 8
    assert any(np.ndim(order) == 2 for order in load_file(ORDER).values())
    found = summary()
    rows = {(row["sparsity_target"], row["method"]): row for row in found["rows"]}
    for (target, method), row in rows.items():
        view = ModelView(load_model(tmp_path / row["path"], torch.float32))
        policy = json.loads((tmp_path / f"{row['path']}.json").read_text())
        assert [unit["kept"] for unit in policy["units"][1::2]] == [block.channels for block in view.blocks]
        assert 0 <= policy["removed"]["macs"] - target < 0.02
        assert row["params"] < found["dense"]["params"]
        if "+" not in method:
            assert row["perplexity"] != rows[target, f"{method}+ridge"]["perplexity"]
    before = contents(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=r"ridge\.repairs asks for the repair stream of a Mixtral"):
        run(
            "ridge", params(**given | {"ridge": {"repairs": {"ridge": ["uniform", "searched"], "stream": ["uniform"]}}})
        )
    assert contents(tmp_path) == before


def test_a_search_without_repairs_needs_no_grams(scratch: Path) -> None:
    (scratch / "data/stats/grams/layers.1.safetensors").write_bytes(b"")
    run("search", params(search={"compensated": False}))
    assert json.loads(Path(SEARCH_POLICY).read_text())["sparsity"] >= 0.2


def test_long_steps_show_how_far_they_are(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = seen_bars(monkeypatch)

    def seen(stage: str, **changes: Any) -> dict[str, tuple[int, int]]:
        bars.clear()
        run(stage, params(**changes))
        return {bar.description: (bar._done, bar.total) for bar in bars}

    # Without a trial, the race of candidates is all that there is to see.
    (race,) = seen("transfer", transfer={"episodes": 0}).items()
    assert race[0] == "transfer 0.3, samples of candidates"
    assert race[1][0] == race[1][1] >= params().search.final_samples
    assert "best " in bars[0]._shown and "perplexity " in bars[0]._shown
    units, repairs = 4, params().ridge.repairs
    assert seen("ridge") == {
        f"repair {name}, units": (2 * units * len(policies), 2 * units * len(policies))
        for name, policies in repairs.items()
        if policies
    }
    assert seen("report") == {"report": (9, 9)}
    assert list(seen("download")) == ["download text (MB)", "download model (MB)", "save model"]
    assert [bar._shown for bar in bars] == [
        "source the local path source/text.txt",
        "source the local path source/model",
        "",
    ]


def test_a_policy_for_any_sparsity_is_had_without_a_run(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params().model_dump()))
    told = json.loads(Path(SEARCH_POLICY).read_text())["front"]
    for point in (told[1], told[-2]):
        found = policy_at(point["sparsity"])
        assert list(found.allocation.kept) == point["kept"]
        assert (found.loss, found.stderr) == pytest.approx((point["predicted_loss"], point["predicted_stderr"]))
    between = (told[1]["sparsity"] + told[2]["sparsity"]) / 2
    print_policy(between, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["removed"]["parameters"] == pytest.approx(between, abs=0.02)
    assert sum(row["kept"] for row in answer["units"]) == sum(policy_at(between).allocation.kept)
    print_policy(0.5, as_json=False)
    told_so = capsys.readouterr()
    assert "transfer.sparsity=0.5, then make run" in told_so.out
    assert "the search learnt for" in told_so.err
    with pytest.raises(UnreachableSparsity):
        policy_at(0.99)


def test_a_bank_without_room_is_told_with_what_one_takes(scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("levels", params(levels={"gigabytes": 1e-9}))
    told = capfd.readouterr().err
    assert "warning: no bank has room in levels.gigabytes (1e-09): the smallest takes" in told
    assert not list(Path(LEVELS).iterdir())
    run("levels", params(levels={"gigabytes": 0}))
    assert "warning" not in capfd.readouterr().err


def test_a_search_with_a_smaller_bank_or_none_finds_the_same(scratch: Path) -> None:
    before = Path(SEARCH_POLICY).read_bytes()
    for bank in ({"step": 8}, {"gigabytes": 0}):
        run("levels", params(levels=bank))
        run("search")
        assert Path(SEARCH_POLICY).read_bytes() == before


def test_a_model_without_a_finite_perplexity_is_a_row_of_the_report(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawn above already, and slow
    evaluation = json.loads(Path(EVALUATION).read_text())
    evaluation["rows"][0]["perplexity"] = None
    Path(EVALUATION).write_text(json.dumps(evaluation))
    run("report")
    assert summary()["rows"][0]["perplexity"] is None
    assert "| uniform |" in (Path(FIGURES) / "results.md").read_text()


# --- other budgets ---


def policies() -> dict[str, dict[str, Any]]:
    """``SPARSITY/POLICY`` -> what stands beside the pruned model."""
    files = sorted(Path(PRUNED).glob("*/*.json"))
    return {f"{file.parent.name}/{file.stem}": json.loads(file.read_text()) for file in files}


def test_multiply_adds_are_searched_cut_and_told(scratch: Path) -> None:
    budget = {"search": {"budget": "macs", "context": 8}}
    for stage in ("latency", "search", "transfer", "prune"):
        run(stage, params(**budget))
    view = ModelView(load_model(Path("models/dense"), torch.float32))
    sizes = view.granule_macs(8)
    for path, target in ((SEARCH_POLICY, 0.2), (TRANSFER_POLICY, 0.3)):
        policy = json.loads(Path(path).read_text())
        assert policy["budget"] == {"name": "macs", "context": 8, "latency": {}}
        assert (
            target
            <= policy["removed"]["macs"]
            < target + min(sizes) / sum(unit.granules * size for unit, size in zip(view.units, sizes, strict=True))
        )
        assert policy["removed"]["parameters"] == policy["sparsity"]
    for name, policy in policies().items():
        assert policy["budget"] == "macs"
        assert 0 <= policy["removed"]["macs"] - policy["sparsity_target"] < 0.02, name


def test_latency_is_searched_cut_measured_and_reported(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawn above already, and slow
    monkeypatch.setattr(latency_stage, "block_latencies", lambda view, *_: Latencies(block_times(view), 10.0))
    short = params(
        search={"budget": "latency", "sparsity": 0.15},
        evaluate={"methods": ["uniform", "searched"], "zero_shot": {"methods": []}},
    )
    # The transfer of the chain, whose budget is parameters, stays: prune takes policies of any budget.
    for stage in ("latency", "search", "prune", "evaluate", "report"):
        run(stage, short)
    policy = json.loads(Path(SEARCH_POLICY).read_text())
    units = Budget.on(ModelView(load_model(Path("models/dense"), torch.float32)), policy["budget"]).units
    assert uneven.is_tight(units, [row["kept"] for row in policy["units"]], 0.15, Bounds(0.2, 1.0))
    assert set(policy["removed"]) == {"parameters", "macs", "latency"}
    for row in summary()["rows"]:
        assert row["removed"]["parameters"] == row["sparsity"]
        assert row["budget"] == ("latency" if row["sparsity_target"] == 0.15 else "parameters")
        assert 0 <= row["removed"][row["budget"]] - row["sparsity_target"] < 0.02
    assert "| latency removed |" in (Path(FIGURES) / "results.md").read_text()


# --- wrong inputs ---


def test_an_unreachable_sparsity_names_the_reach_before_any_work(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_reward, "prepare", lambda *_: pytest.fail("work was done"))
    # Within 1 - min_keep, which params.yaml is checked against, but not with whole key/value groups.
    message = refused(UnreachableSparsity, "search", search={"sparsity": 0.79})
    assert "sparsity 0.79 was asked for" in message
    assert "reach 0.000 to 0." in message
    assert "search.min_keep" in message


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("calibrate", {"calibrate": {"windows": 10_000}}, "calibrate.windows"),
        ("sensitivity", {"sensitivity": {"fisher": {"windows": 10_000}}}, "sensitivity.fisher.windows"),
        ("search", {"search": {"final_samples": 10_000}}, "search.final_samples"),
        ("search", {"search": {"seqlen": 1_000}}, "1 windows of 1000 tokens"),
        ("evaluate", {"evaluate": {"windows": 10_000}}, "evaluate.windows"),
    ],
)
def test_too_little_text_is_refused_with_the_parameter(
    scratch: Path, stage: str, change: dict[str, Any], message: str
) -> None:
    assert message in refused(TooLittleText, stage, **change)


@pytest.mark.parametrize(("first", "then"), [("guided", "warm"), ("warm", "guided")])
def test_an_agent_of_another_kind_is_not_transferred(scratch: Path, first: str, then: str) -> None:
    run("search", params(search={"agent": first}))
    message = refused(ParameterError, "transfer", search={"agent": then})
    assert f"search.agent {then} was asked to go on with {SEARCH_AGENT}" in message
    run("transfer", params(search={"agent": first}))


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("calibrate", {"calibrate": {"seqlen": 1_025}}),
        ("sensitivity", {"sensitivity": {"hutchinson": {"seqlen": 1_025}}}),
        ("search", {"search": {"seqlen": 1_025}}),
        ("ridge", {"ridge": {"stream": {"seqlen": 1_025}}}),
        ("evaluate", {"evaluate": {"seqlen": 1_025}}),
    ],
)
def test_windows_longer_than_the_models_context_are_refused(scratch: Path, stage: str, change: dict[str, Any]) -> None:
    message = refused(ParameterError, stage, **change)
    assert f"{next(iter(change))}." in message
    assert "windows of 1025 tokens" in message
    assert "context of 1024 tokens" in message


@pytest.mark.parametrize("stage", ["calibrate", "sensitivity", "search", "transfer", "prune", "ridge", "evaluate"])
def test_without_a_dense_model_the_stage_that_makes_it_is_named(scratch: Path, stage: str) -> None:
    shutil.rmtree("models/dense")
    Path("params.yaml").write_text(json.dumps(params().model_dump(mode="json")))
    before = contents(scratch)
    with pytest.raises(MissingInput, match=r"models/dense was asked for .* the stage 'download' makes it"):
        run_stage(stage_named(stage))
    assert contents(scratch) == before


def test_a_source_that_is_not_there_is_named(scratch: Path) -> None:
    message = refused(MissingInput, "download", model={"source": {"kind": "local", "path": "source/modle"}})
    assert "source/modle does not exist" in message


# --- the other process has had time to start ---


def test_a_new_process_measures_the_same_perplexity(chains: dict[str, Path], reloading: subprocess.Popen[str]) -> None:
    output, errors = reloading.communicate()
    assert reloading.returncode == 0, errors
    found = json.loads(output)
    assert len(found) == 2 * (1 + 2 * len(METHODS))
    for root in chains.values():
        told = json.loads((root / SUMMARY).read_text())
        for row in (told["dense"], *told["rows"]):
            assert found[str(root / row["path"])] == pytest.approx(row["perplexity"], rel=2e-5)
