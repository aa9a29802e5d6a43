"""A study: the pipeline once more in ``studies/MODEL``, where every method of the section ``methods`` is a stage.

Its params.yaml is the project's with the model and text of a profile, its dvc.yaml the project's with the stages that
methods need. Both belong to the study from then on: only ``methods`` is added to. Documents of zero-shot tasks stay in
the project, for all studies.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.artifacts import read_json, write_csv, write_text
from ffprune.stages.editing import round_trip, write_parameters
from ffprune.stages.exhibits.comparison import comparison
from ffprune.stages.exhibits.exhibit import render
from ffprune.stages.exhibits.page import Rendered
from ffprune.stages.exhibits.papers import comparison_methods, exhibit
from ffprune.stages.exhibits.results import Setting, results_of
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.profiles import current_profile, profiles, with_profile
from ffprune.stages.record import METHOD, PIPELINE_MODEL, TRACES
from ffprune.stages.sections import Tracking
from ffprune.stages.tracking import open_store, start_parent

FOLDER = Path("studies")
REPORTS = Path("reports")
#: Stages of the project that a study has.
STAGES = ("download", "calibrate", "sensitivity", "fetch", "decide", "method")


def reproduce_exhibit(name: str, model: str | None, full: bool, show: bool, workers: int) -> bool:
    """Run what a table or figure needs, then print and write it.

    Args:
        name: such as ``ff-table-2``.
        model: a profile; None: the one in use.
        full: the paper's size instead of the short one.
        show: run nothing, only show what has been measured.
        workers: methods at the same time; 0: as many as this machine has room for.

    Returns:
        Whether every stage succeeded.

    Raises:
        ParameterError: no such table, figure or profile.
    """
    chosen = exhibit(name)
    recipes = chosen.recipes(full)
    study, folder = open_study(model, recipes)
    what, needed = f"{chosen.heading}: {chosen.title}, on {study}", ["sensitivity"] if chosen.traces else []
    done = show or _run(folder, what, chosen.minutes.of(full), workers, recipes, needed)
    traces = folder / TRACES
    shown = render(
        chosen,
        results_of(folder, recipes),
        setting_of(folder, study),
        full,
        read_json(traces) if chosen.traces and traces.is_file() else (),
    )
    _publish(folder, chosen.name, shown)
    return done


def compare(model: str | None, full: bool, show: bool, workers: int) -> bool:
    """Every method beside the others at equal removed parameters; arguments as :func:`reproduce_exhibit`."""
    methods = comparison_methods()
    recipes = methods.recipes(full)
    study, folder = open_study(model, recipes)
    what = f"{len(recipes)} methods on {study}"
    done = show or _run(folder, what, methods.minutes.of(full), workers, recipes)
    known = load_params(folder / PARAMS_FILE).methods
    everything = [name for name, recipe in known.items() if recipe.model == PIPELINE_MODEL]
    _publish(folder, "comparison", comparison(results_of(folder, everything), setting_of(folder, study)))
    return done


def open_study(model: str | None, recipes: Mapping[str, Any]) -> tuple[str, Path]:
    """The study's name and folder, with these recipes among its methods.

    Raises:
        MissingInput: this is not the project's folder.
        ParameterError: no such profile.
    """
    if not Path("profiles").is_dir() or not Path("dvc.yaml").is_file():
        raise MissingInput(
            f"a study was to be made in {Path.cwd()}",
            "studies are made in the project's folder, the one with dvc.yaml and profiles/",
            "change to that folder",
        )
    name = model or current_profile()
    if name not in profiles():
        raise ParameterError(
            f"the model {name!r} was asked for" if name else "no model was named, and params.yaml holds none of them",
            f"there are {', '.join(profiles())} in profiles/",
            "name one with --model, or add a file",
        )
    folder = FOLDER / name
    file = folder / PARAMS_FILE
    new = not file.is_file()
    text = with_profile(PARAMS_FILE.read_text(), name) if new else file.read_text()
    yaml = round_trip()
    values = yaml.load(text)
    known = values["methods"] or {}
    values["methods"] = {**known, **{name: _with(recipe, known.get(name, {})) for name, recipe in recipes.items()}}
    if new:
        values["study"]["zero_shot"]["data"] = _shared(load_params().study.zero_shot.data)
    out = io.StringIO()
    yaml.dump(values, out)
    write_parameters(out.getvalue(), file)
    if not (folder / "dvc.yaml").is_file():
        write_text(folder / "dvc.yaml", pipeline(Path("dvc.yaml").read_text(), list(values["study"]["texts"])))
    return name, folder


def _with(recipe: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that is also asked and kept for what the entry of its name was asked and kept for before."""
    return {**recipe, **{key: recipe[key] or known.get(key, False) for key in ("zero_shot", "speed", "save")}}


def _shared(data: str) -> str:
    """The project's folder of documents as a study names it."""
    folder = Path(data)
    if folder.is_absolute():
        return data
    # A method depends on the folder, so it must be there; an empty one leaves every task to the hub.
    folder.mkdir(parents=True, exist_ok=True)
    return f"../../{folder}"


def pipeline(text: str, texts: Sequence[str]) -> str:
    """A study's dvc.yaml.

    Args:
        text: the project's dvc.yaml.
        texts: names of the texts in ``study.texts``.
    """
    yaml = round_trip()
    values = yaml.load(text)
    for name in list(values["stages"]):
        if name not in STAGES:
            del values["stages"][name]
    for entry in values["stages"].values():
        body = entry.get("do", entry)
        body["deps"] = [f"../../{dep}" if dep.startswith("src/") else dep for dep in body.get("deps", [])]
    deps = values["stages"]["method"]["do"]["deps"]
    place = next(i for i, dep in enumerate(deps) if dep.startswith("${study.texts."))
    deps[place : place + 1] = [f"${{study.texts.{name}}}" for name in texts]
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


def _run(
    folder: Path, what: str, minutes: int, workers: int, recipes: Iterable[str], besides: Sequence[str] = ()
) -> bool:
    """The pipeline's own flow, in the study; says what it will cost before it starts."""
    cost = f"about {minutes} minutes on two cores with the default model, if nothing is cached"
    print(f"{what}; {cost}", flush=True)
    stages = [*(METHOD.of(key).name for key in recipes), *besides]
    words = [sys.executable, "-m", "ffprune", "run", "--workers", str(workers), *stages]
    with subprocess.Popen(words, cwd=folder) as flow:
        try:
            return flow.wait() == 0
        except KeyboardInterrupt:
            # A terminal's Ctrl-C has reached the flow, too.
            flow.wait()
            raise
        except SystemExit:
            # SIGTERM came to this process alone, as Ctrl-C does not: the flow ends its stages in order.
            flow.terminate()
            raise
        except BaseException:
            flow.kill()
            raise


def setting_of(folder: Path, study: str) -> Setting:
    """What the results of a study have in common."""
    params = load_params(folder / PARAMS_FILE)
    return Setting(study, params.study.texts[next(iter(params.study.texts))], params.compute.dtype, params.seed)


def _publish(folder: Path, name: str, shown: Rendered) -> None:
    tracking = load_params(folder / PARAMS_FILE).tracking
    publish(folder / REPORTS / f"{name}.md", f"{name} {folder.name}", shown, tracking)


def publish(place: Path, title: str, shown: Rendered, tracking: Tracking) -> None:
    """Print the page, write it with its figure and its numbers, and give MLflow a run of it.

    Args:
        place: the page; numbers and figure stand beside it.
        title: of the run.
        shown: what to publish.
        tracking: where runs are recorded.
    """
    write_text(place, shown.markdown)
    if shown.rows:
        write_csv(place.with_suffix(".csv"), shown.rows)
    if shown.figure is not None:
        shown.figure.savefig(place.with_suffix(".png"), dpi=120)
    store = open_store(tracking)
    run = start_parent(store, title, {"ffprune.kind": "exhibit"})
    store.client.log_text(run, shown.markdown, place.name)
    if shown.figure is not None:
        store.client.log_figure(run, shown.figure, f"{place.stem}.png")
    store.client.set_terminated(run, "FINISHED")
    print(shown.markdown)
    print(f"written: {place}")
