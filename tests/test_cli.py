from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ffprune import cli
from ffprune.stages.artifacts import atomic_dir
from ffprune.stages.record import ENTRIES, STAGES
from tests.tiny import llama, mixtral
from tests.toy import REPO


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["ffprune", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_help_lists_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(stage.name in shown for stage in (*STAGES, *ENTRIES))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import ffprune.cli;print({'torch', 'mlflow', 'dvc', 'prefect', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_a_refusal_is_one_message_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "params", "check") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: the parameters were asked of params.yaml")
    assert shown.count("\n") == 1
    assert run_cli(monkeypatch, "run") == 2


def test_params_check_asks_the_model_that_is_there_what_a_budget_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (REPO / "params.yaml").read_text()
    text = text.replace("  sparsity: 0.2 ", "  sparsity: 0.79 ").replace("  budget: parameters ", "  budget: macs ")
    Path("params.yaml").write_text(text)
    assert run_cli(monkeypatch, "params", "check") == 0
    llama().config.save_pretrained("models/dense")
    assert run_cli(monkeypatch, "params", "check") == 2
    assert "error: sparsity 0.79 was asked for, as a share of macs" in capsys.readouterr().err


def test_params_check_refuses_repairs_that_experts_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPO / "params.yaml").read_text())
    mixtral().config.save_pretrained("models/dense")
    assert run_cli(monkeypatch, "params", "check") == 2
    assert "error: ridge.repairs asks for the repair stream of a MixtralForCausalLM" in capsys.readouterr().err


def test_params_check_asks_the_text_that_is_there_for_the_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPO / "params.yaml").read_text())
    Path("data/text").mkdir(parents=True)
    Path("data/text/test.txt").write_text("no sentence to go on with")
    assert run_cli(monkeypatch, "params", "check") == 2
    assert "error: Asked for a wiki_continuation task of 16 items" in capsys.readouterr().err


def test_params_check_refuses_methods_whose_parts_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (REPO / "params.yaml").read_text()
    assert text.endswith("methods: {}\n")
    recipe = (
        "{label: toy, model: dense, sparsity: 0.5, allocator: owl, compressor: slice, criterion: wanda_column, "
        "repair: null, pattern: null, inputs: pruned, tokens: equal, calibration_windows: null, quantize: null, "
        "trials: null, first: null, zero_shot: false, speed: false, save: false}"
    )
    Path("params.yaml").write_text(text.replace("methods: {}", f"methods:\n  toy: {recipe}"))
    assert run_cli(monkeypatch, "params", "check") == 2
    assert "methods.toy.allocator owl was asked for with compressor slice" in capsys.readouterr().err
    Path("params.yaml").write_text(text.replace("methods: {}", f"methods:\n  toy: {recipe.replace('owl', 'flap')}"))
    assert run_cli(monkeypatch, "params", "check") == 0
    assert "every parameter is known and valid" in capsys.readouterr().out
    # Once the model is there, what it cannot do is known as well.
    changed = recipe.replace("owl", "flap").replace("repair: null", "repair: bias").replace("save: false", "save: true")
    Path("params.yaml").write_text(text.replace("methods: {}", f"methods:\n  toy: {changed}"))
    assert run_cli(monkeypatch, "params", "check") == 0
    llama().config.save_pretrained("models/dense")
    assert run_cli(monkeypatch, "params", "check") == 2
    assert "methods.toy.save was asked for with repair bias" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [stage.name for stage in ENTRIES])
def test_an_entry_that_is_not_there_is_named_with_those_that_are(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPO / "params.yaml").read_text())
    assert run_cli(monkeypatch, stage, "wanda-50") == 2
    assert "'wanda-50' was asked for" in capsys.readouterr().err


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ffprune.stages.table.print_table", interrupted)
    assert run_cli(monkeypatch, "table") == 130


WRITING = """
import sys, time, types
from pathlib import Path
from ffprune import cli
from ffprune.stages.artifacts import atomic_dir, atomic_file
def export_model(folder, out, *rest):
    with atomic_dir(out) as place, atomic_file(out.with_suffix(".file")):
        (place / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
sys.modules["ffprune.stages.export"] = types.SimpleNamespace(export_model=export_model)
sys.argv = ["ffprune", "export", "model", sys.argv[1], "--to", "hf"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_ended_leaves_nothing_for_long(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, out],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
    with atomic_dir(out):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == [out]


def test_sigterm_stays_with_whoever_handles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_cli(monkeypatch, "--help") == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ffprune.stages.table.print_table", broken)
    monkeypatch.setattr(sys, "argv", ["ffprune", "table"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_shell_can_complete_commands() -> None:
    asked = {"_FFPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "ffprune rep", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['ffprune']; from ffprune.cli import main; main()"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **asked}
    )
    assert set(answer.stdout.split()) == {"report", "reproduce"}


def test_profiles_are_listed_for_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("model: {name: b}\ndata: {text: b}\n")
    Path("profiles").mkdir()
    for name in "ab":
        Path(f"profiles/{name}.yaml").write_text(f"# About {name}\nmodel: {{name: {name}}}\ndata: {{text: {name}}}\n")
    assert run_cli(monkeypatch, "profile", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "a", "about": "About a", "current": False},
        {"name": "b", "about": "About b", "current": True},
    ]
    assert run_cli(monkeypatch, "profile", "list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["*", "b", "About", "b"]


def test_what_is_registered_and_pulled_is_told_to_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffprune.stages import registering, registry, tracking

    monkeypatch.chdir(REPO)
    found = registering.Registered("Small", "3", "dvc://models/a?out=models&md5=0", ("best", "best-20"), True)
    monkeypatch.setattr(tracking, "open_store", lambda given: "the store")
    monkeypatch.setattr(registering, "register_models", lambda store: [found])
    monkeypatch.setattr(registry, "pull_model", lambda store, model, out: out or Path("models/pulled/Small-3"))
    assert run_cli(monkeypatch, "register", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told == {
        "name": "Small",
        "version": "3",
        "source": found.source,
        "aliases": ["best", "best-20"],
        "new": True,
    }
    assert run_cli(monkeypatch, "register") == 0
    assert capsys.readouterr().out == f"Small version 3 (best, best-20): {found.source}\n"
    assert run_cli(monkeypatch, "pull-model", "Small@best", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"model": "Small@best", "path": "models/pulled/Small-3"}
    assert run_cli(monkeypatch, "pull-model", "Small@best", "mine") == 0
    assert capsys.readouterr().out == "written: mine\n"


@pytest.mark.parametrize("words", [("plan",), ("verify",), ("register",), ("pull-model",), ("profile", "list")])
def test_what_scripts_read_has_json(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_cli(monkeypatch, *words, "--help") == 0
    assert "json" in capsys.readouterr().out
