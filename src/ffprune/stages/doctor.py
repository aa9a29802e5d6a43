"""``ffprune doctor``: does this machine have what a run needs, and what to mend where it has not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ffprune.core.errors import ChecksumMismatch, FfpruneError, ParameterError
from ffprune.stages.devices import slots_of
from ffprune.stages.environment import QUIET_REPORTS, SERVER_FILE, answers, in_time
from ffprune.stages.graph import reach_remotes
from ffprune.stages.integrity import check_code
from ffprune.stages.lineage import repository
from ffprune.stages.params import PARAMS_FILE, load_params
from ffprune.stages.sections import Params
from ffprune.stages.tracking import (
    TrackingUnavailable,
    is_database,
    open_store,
    reach_database,
    shown_uri,
    store_uri,
)

Status = Literal["ok", "warning", "failed"]
_PATIENCE_SECONDS = 3.0
#: Importing MLflow takes seconds on a busy machine.
_OPENING_SECONDS = 60.0
#: The default run holds about 3 GB of models; less room than that ends in the middle of one.
_LEAST_FREE_BYTES = 5e9
_OTHER_STORE = "start it, or change MLFLOW_TRACKING_URI or tracking.uri"


@dataclass(frozen=True)
class Check:
    """What was looked at and found.

    Attributes:
        name: what was looked at.
        status: ``failed``: a run will not go well; ``warning``: something may not be meant.
        found: how it is.
        mend: what to do; empty when nothing is.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def print_checks(as_json: bool) -> bool:
    """Look at everything and print it; whether nothing failed."""
    checks = list(examine(Path.cwd()))
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{check.status:8} {check.name}: {check.found}")
            if check.mend:
                print(f"{'':8} -> {check.mend}")
    return all(check.status != "failed" for check in checks)


def examine(root: Path) -> Iterator[Check]:
    """Every check of a project's folder; one that raises is a failed one."""
    try:
        params = load_params(root / PARAMS_FILE)
        yield Check("parameters", "ok", f"{PARAMS_FILE} is valid")
    except FfpruneError as refusal:
        params = None
        yield Check("parameters", "failed", str(refusal), "mend params.yaml, or change to the project's folder")
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", versions),
        ("commands", partial(commands, root)),
        ("disk", partial(disk, root)),
        ("DVC", partial(dvc, root)),
        ("Prefect", partial(prefect_server, repository(root))),
        ("telemetry", telemetry),
    ]
    if params is not None:
        looks += [("device", partial(device, params)), ("MLflow", partial(mlflow_store, params))]
    for name, look in looks:
        try:
            yield from look()
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            yield Check(name, "failed", f"{type(error).__name__}: {said}", "see the message")


def versions() -> Iterator[Check]:
    """Installed packages against the bounds that pyproject.toml sets."""
    wrong = []
    needed = [Requirement(line) for line in requires("ffprune") or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found} (needs {one.specifier or 'any'})")
    if wrong:
        yield Check("versions", "failed", "; ".join(wrong), "pip install -r requirements.lock, or make venv")
    else:
        yield Check("versions", "ok", f"{len(needed)} packages within the bounds of pyproject.toml")


def commands(root: Path) -> Iterator[Check]:
    """What stages and their records call by name."""
    # As dvc.yaml has it: the path, then the project's own environment.
    places = os.pathsep.join([os.environ.get("PATH", ""), str(repository(root) / ".venv" / "bin")])
    found = shutil.which("ffprune", path=places)
    if found is None:
        yield Check(
            "ffprune", "failed", "stages call ffprune, which is not on the path", "activate .venv, or make venv"
        )
    else:
        try:
            check_code(repository(root), _code_of(Path(found)))
            yield Check("ffprune", "ok", f"stages run {found}")
        except ChecksumMismatch as refusal:
            yield Check("ffprune", "failed", f"stages run {found}: {refusal.asked}", refusal.change)
    if shutil.which("git") is None:
        yield Check("git", "warning", "not installed: runs are recorded without their commit", "install git")


def _code_of(command: Path) -> Path | None:
    """The package behind a command that pip wrote: its first line names the Python. None where that cannot be told."""
    with command.open("rb") as file:
        first = file.readline().decode(errors="replace")
    python = Path(first.removeprefix("#!").strip())
    if not (first.startswith("#!") and python.name.startswith("python") and python.is_file()):
        return None
    look = "import ffprune; print(ffprune.__path__[0])"
    answer = subprocess.run([python, "-P", "-c", look], capture_output=True, text=True, timeout=60)
    return Path(answer.stdout.strip()) if answer.returncode == 0 else None


def disk(root: Path) -> Iterator[Check]:
    """Room where outputs, caches and checkpoints go."""
    free = shutil.disk_usage(root).free
    short = free < _LEAST_FREE_BYTES
    mend = "make room (dvc gc -w drops what the workspace does not use); ffprune plan says what a run needs"
    yield Check("disk", "failed" if short else "ok", f"{free / 1e9:,.1f} GB free in {root}", mend if short else "")


def dvc(root: Path) -> Iterator[Check]:
    """The repository, its locks, and whether its remotes answer."""
    place = repository(root)
    if not (place / ".dvc").is_dir():
        yield Check("DVC", "failed", f"{root} is in no DVC repository", "change to the project's folder (or dvc init)")
        return
    locks = place / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(locks.read_text() or "{}") if locks.is_file() else {}
        yield Check("DVC", "ok", f"repository {place}")
    except ValueError:
        # As a full disk or a power cut leaves it; DVC then refuses everything.
        yield Check("DVC", "failed", f"{locks} is damaged", "delete it while no run is active")
    remotes = reach_remotes(place, _PATIENCE_SECONDS)
    if not remotes:
        yield Check("remotes", "ok", "none; results stay on this machine")
    for name, problem in remotes.items():
        if problem is None:
            yield Check(f"remote {name}", "ok", "answers")
        else:
            yield Check(f"remote {name}", "warning" if problem.new else "failed", problem.found, problem.mend)


def prefect_server(project: Path) -> Iterator[Check]:
    """A server that was named must answer; without one, runs start their own."""
    given, file = os.environ.get("PREFECT_API_URL"), project / SERVER_FILE
    if given and not answers(f"{given}/health", _PATIENCE_SECONDS):
        yield Check("Prefect", "failed", f"no answer at PREFECT_API_URL {given}", "start that server, or unset it")
    elif given:
        yield Check("Prefect", "ok", f"server at {given}")
    elif file.is_file():
        url = file.read_text().strip()
        live = answers(f"{url}/health", _PATIENCE_SECONDS)
        found = (
            f"server at {url}" if live else f"{file} names {url}, which does not answer; runs start their own server"
        )
        yield Check("Prefect", "ok" if live else "warning", found, "" if live else "make ui, or delete the file")
    else:
        yield Check("Prefect", "ok", "no server; every run starts its own (make ui keeps one)")


def mlflow_store(params: Params) -> Iterator[Check]:
    """Where runs are recorded."""
    uri = store_uri(params.tracking)
    if uri.startswith("http"):
        live = answers(f"{uri.rstrip('/')}/health", _PATIENCE_SECONDS)
        found = f"{'server' if live else 'no answer'} at {shown_uri(uri)}"
        yield Check("MLflow", "ok" if live else "failed", found, "" if live else _OTHER_STORE)
    elif uri.startswith("sqlite:"):
        file = Path(uri.removeprefix("sqlite:///"))
        place = file if file.exists() else next(parent for parent in file.parents if parent.exists())
        if not os.access(place, os.W_OK):
            yield Check("MLflow", "failed", f"{place} cannot be written", "change its owner, or tracking.uri")
        else:
            yield Check("MLflow", "ok", uri + ("" if file.exists() else " (made by the first run)"))
    else:
        yield _other_store(params, uri)


def _other_store(params: Params, uri: str) -> Check:
    """A database that others share, or what MLflow may not take at all (3.17 keeps no runs in a plain folder)."""
    try:
        if is_database(uri):
            # Not opened: MLflow would make its tables there.
            reach_database(uri, _PATIENCE_SECONDS)
        else:
            in_time(partial(open_store, params.tracking), _OPENING_SECONDS)
    except TrackingUnavailable as refusal:
        return Check("MLflow", "failed", refusal.asked, refusal.change)
    except Exception as error:
        said = " ".join(str(error).replace(uri, shown_uri(uri)).split())[:300]
        return Check("MLflow", "failed", f"{shown_uri(uri)}: {said}", _OTHER_STORE)
    return Check("MLflow", "ok", shown_uri(uri))


def device(params: Params) -> Iterator[Check]:
    """The processor or GPU that params.yaml asks for."""
    import torch

    wanted = params.compute.device
    try:
        slots_of(params.compute, params.workers)
    except ParameterError as refusal:
        yield Check("device", "failed", f"{refusal.asked}: {refusal.possible}", refusal.change)
        return
    kind = wanted.partition(":")[0]
    if kind == "cpu":
        yield Check("device", "ok", f"{wanted}, {os.cpu_count()} processors")
    elif kind == "cuda":
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Check("device", "ok", f"{wanted}: {', '.join(names)}")
    else:
        yield _other_device(wanted)


def _other_device(wanted: str) -> Check:
    """A kind of which no more is known than that a tensor can be made there."""
    import torch

    try:
        torch.zeros(1, device=wanted)
    except Exception as error:  # torch has one kind of error for each kind of device
        said = " ".join(str(error).split())[:150]
        found = f"compute.device is {wanted}, torch {torch.__version__} has none here: {said}"
        return Check("device", "failed", found, "install a torch build for it, or set compute.device to cpu")
    return Check("device", "ok", wanted)


def telemetry() -> Iterator[Check]:
    """Variables that switch off what libraries report home."""
    given = {name: os.environ.get(name, "") for name in QUIET_REPORTS}
    on = [f"{name}={text}" for name, text in given.items() if _truth(text) != _truth(QUIET_REPORTS[name])]
    if on:
        yield Check("telemetry", "warning", f"switched on by {', '.join(on)}", "unset these variables")
    else:
        yield Check("telemetry", "ok", "off in everything that ffprune starts")


def _truth(text: str) -> bool | None:
    """What a variable's word means; None for others, and without one."""
    word = text.strip().lower()
    return True if word in ("1", "true", "yes", "on") else False if word in ("0", "false", "no", "off") else None
