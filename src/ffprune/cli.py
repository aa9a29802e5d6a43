"""``ffprune``: the whole pipeline, one command per stage, and what people type around them."""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ffprune.core.errors import FfpruneError
from ffprune.stages.environment import quieten
from ffprune.stages.lifeline import die_with_parent, hasten_exit, leave_on_sigterm
from ffprune.stages.record import ENTRIES, STAGES, Stage

# Everything heavy is imported inside the commands: `ffprune --help` answers at once.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search how much of each layer of a language model can go, remove it, repair the rest.",
)
profile = typer.Typer(no_args_is_help=True, help="Switch model and text.")
params = typer.Typer(no_args_is_help=True, help="Look at params.yaml, and change it.")
app.add_typer(profile, name="profile")
app.add_typer(params, name="params")


Workers = Annotated[
    int,
    typer.Option(min=0, help="Stages that may run at the same time, sharing processors; 0: as many as have room."),
]


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Only these stages and what they need.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run the stages even when nothing changed.")] = False,
    workers: Workers = 1,
) -> None:
    """Run the pipeline: DVC decides what is stale, Prefect runs it, MLflow records it."""
    from ffprune.stages.launch import launch

    launch(stages or [], force, workers)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Check versions, device, disk, remotes, servers and telemetry; say what to mend. Status 1 if a run would fail."""
    from ffprune.stages.doctor import print_checks

    if not print_checks(as_json):
        sys.exit(1)


@app.command()
def table(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Print the result table, and that of the section `methods` where some were measured."""
    from ffprune.stages.table import print_table

    print_table(as_json=as_json)


@app.command()
def verify(
    drop: Annotated[bool, typer.Option("--drop", help="Delete what is damaged, so that DVC gets it again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Compare all outputs and their cache entries with dvc.lock, byte by byte."""
    from ffprune.stages.graph import cache_folder
    from ffprune.stages.integrity import verify

    verify(cache_folder(Path.cwd()), drop, as_json)


Model = Annotated[str | None, typer.Option("--model", help="A profile; the one in params.yaml if none is named.")]
Full = Annotated[bool, typer.Option("--full", help="The paper's size; the short one fits 20 minutes on two cores.")]
Show = Annotated[bool, typer.Option("--show", help="Run nothing; show what has been measured.")]


@app.command()
def reproduce(exhibit: str, model: Model = None, full: Full = False, show: Show = False, workers: Workers = 0) -> None:
    """Make a paper's table or figure again: ff-table-2, ss-fig-6, ms-table-4 ..."""
    from ffprune.stages.study import reproduce_exhibit

    if not reproduce_exhibit(exhibit, model, full, show, workers):
        sys.exit(1)


@app.command()
def compare(model: Model = None, full: Full = False, show: Show = False, workers: Workers = 0) -> None:
    """Set all methods side by side at equal removed parameters."""
    from ffprune.stages.study import compare

    if not compare(model, full, show, workers):
        sys.exit(1)


@app.command()
def sweep(
    models: Annotated[list[str] | None, typer.Option("--model", help="A profile; repeat for several.")] = None,
    granularities: Annotated[
        list[str] | None, typer.Option("--granularity", help="structured (as a rule), unstructured, 2:4, 4:8; repeat.")
    ] = None,
    sparsities: Annotated[
        list[float] | None,
        typer.Option("--sparsity", help="Removed / prunable; repeat. None: as `compare`."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="One of `compare`; repeat. None: its short list."),
    ] = None,
    full: Full = False,
    show: Show = False,
    workers: Workers = 0,
) -> None:
    """Run methods on several models at several sparsities and granularities, each model in its study; one table."""
    from ffprune.stages.sweep import run_sweep

    run_sweep(models or [], granularities or ["structured"], sparsities or [], methods or [], full, show, workers)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """List allocators, criteria and compressors: paper, section, granularities, needs."""
    from ffprune.stages.recipes import print_catalogue

    print_catalogue(as_json)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Option("--model", help="llama-7b, llama-13b, llama-70b, a folder or a hub identifier.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Estimate memory, disk and time of every stage from a model's config alone."""
    from ffprune.stages.params import load_params
    from ffprune.stages.plan import print_plan

    print_plan(model, load_params(), as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder with config.json and safetensors, or a GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what a model folder holds: widths of every layer, zeros, bytes, how it loads."""
    from ffprune.stages.inspect import print_inspection

    print_inspection(path, as_json)


@app.command()
def policy(
    sparsity: Annotated[float, typer.Argument(help="What to remove, as a share of search.budget, such as 0.25.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what to keep at any sparsity, by what the search has learnt, in seconds: no model runs."""
    from ffprune.stages.policy import print_policy

    print_policy(sparsity, as_json)


@app.command()
def register(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Enter the best measured models, and those that methods keep, into MLflow's registry, as a run does."""
    from ffprune.stages.params import load_params
    from ffprune.stages.registering import register_models
    from ffprune.stages.tracking import open_store

    registered = register_models(open_store(load_params().tracking))
    if as_json:
        print(json.dumps([asdict(found) for found in registered], indent=2))
        return
    for found in registered:
        held = f" ({', '.join(found.aliases)})" if found.aliases else ""
        print(f"{found.name} version {found.version}{held}{'' if found.new else ', known already'}: {found.source}")


@app.command("pull-model")
def pull_model(
    model: Annotated[str, typer.Argument(help="NAME@best, NAME@best-20, NAME@method-METHOD or NAME@VERSION.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to write; models/pulled/NAME-VERSION if none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Get a registered model out of DVC's store, and check that it is the one that was registered."""
    from ffprune.stages.params import load_params
    from ffprune.stages.registry import pull_model as pull
    from ffprune.stages.tracking import open_store

    written = pull(open_store(load_params().tracking), model, out)
    print(json.dumps({"model": model, "path": str(written)}, indent=2) if as_json else f"written: {written}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The file (gguf) or folder (others) to write.")],
    to: Annotated[str, typer.Option("--to", help="hf, gguf, onnx or compressed-tensors.")],
    kind: Annotated[str | None, typer.Option("--type", help="Of gguf: f16 (as a rule), f32, q8_0, q4_k_m.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a model folder as other programs read it: docs/export.md."""
    from ffprune.stages.export import export_model

    export_model(folder, out, to, kind, force)


@profile.command("list")
def profile_list(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """List the profiles; a star marks the one in use."""
    from ffprune.stages.profiles import current_profile, profiles

    current = current_profile()
    if as_json:
        rows = [{"name": name, "about": about, "current": name == current} for name, about in profiles().items()]
        print(json.dumps(rows, indent=2))
        return
    for name, about in profiles().items():
        print(f"{'*' if name == current else ' '} {name:24} {about}")


@profile.command("use")
def profile_use(name: str) -> None:
    """Put a profile's model and data sections into params.yaml."""
    from ffprune.stages.profiles import use_profile

    use_profile(name)
    print(f"params.yaml now has the model and data of '{name}'")


@params.command("check")
def params_check() -> None:
    """Check params.yaml without running anything; once the models are there, their reach as well."""
    from ffprune.stages.params import PARAMS_FILE, load_params
    from ffprune.stages.record import DENSE, LATENCY, dense_model

    given = load_params()
    if (Path(DENSE) / "config.json").exists():
        from ffprune.compress.experts import check_experts
        from ffprune.models.checkpoint import read_view
        from ffprune.stages.budget import check_budget

        view = read_view(DENSE, given.units.heads)
        check_budget(view, given, Path(LATENCY))
        for repair in (name for name, policies in given.ridge.repairs.items() if policies):
            check_experts(view, "ridge.repairs", "slice", repair)
    if Path(given.evaluate.text).is_file():
        from ffprune.stages.zero_shot import check_text

        check_text(Path(given.evaluate.text), given.evaluate.zero_shot, given.seed)
    if given.methods:
        # Tables of methods come with all that they need; only who has methods waits for it.
        from ffprune.models.checkpoint import read_view
        from ffprune.stages.compressing import check_model, check_save
        from ffprune.stages.recipes import check_onload

        # Many methods, few models.
        view_of = functools.cache(read_view)
        for name, recipe in given.methods.items():
            check_onload(name, recipe, given.compute)
            check_save(name, recipe)
            folder = Path(dense_model(recipe.model))
            if (folder / "config.json").exists():  # else the stage `method` refuses, behind a search
                check_model(name, recipe, view_of(folder))
    print(f"{PARAMS_FILE}: every parameter is known and valid")


@params.command("set")
def params_set(
    changes: Annotated[list[str], typer.Argument(help="NAME=VALUE, such as search.sparsity=0.3; all or none.")],
) -> None:
    """Change parameters in params.yaml; comments stay, and nothing is written that would not be valid."""
    from ffprune.stages.editing import parse_changes, set_parameters

    print("\n".join(set_parameters(parse_changes(changes)) or ["nothing to change"]))


@params.command("list")
def params_list(
    names: Annotated[
        list[str] | None, typer.Argument(help="Keys, such as search or ridge.damping; all if none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As docs/parameters.md.")] = False,
) -> None:
    """Show every parameter: value, what is allowed, meaning, and the stages that read it."""
    from ffprune.stages.parameters import parameters, print_parameters

    print_parameters(parameters(below=names or ()), as_json, as_markdown)


def _stage_command(stage: Stage) -> Callable[[], None]:
    def command() -> None:
        die_with_parent()
        from ffprune.stages.run import run_stage

        run_stage(stage)

    return command


for _stage in STAGES:
    app.command(_stage.name, help=_stage.help, rich_help_panel="Stages")(_stage_command(_stage))


def _entry_command(stage: Stage) -> Callable[[str], None]:
    section = str(stage.each)

    def command(name: Annotated[str, typer.Argument(help="An entry of the stage's section.")]) -> None:
        from ffprune.core.tables import look_up
        from ffprune.stages.params import load_params

        look_up(getattr(load_params(), section), name, f"the {section.removesuffix('s')}")
        _stage_command(stage.of(name))()

    return command


for _stage in ENTRIES:
    app.command(_stage.name, help=_stage.help, rich_help_panel="Stages")(_entry_command(_stage))


def main() -> None:
    """Run a command; a refusal is one message and its status, an unexpected error keeps its traceback.

    SIGTERM ends a command as Ctrl-C does, with what it was writing cleared away; the status is then 143.
    """
    quieten()
    atexit.register(hasten_exit)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started it has a reason
        leave_on_sigterm()
    try:
        app()
    except FfpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        from ffprune.stages.exit_status import status_of

        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
