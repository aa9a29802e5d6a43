"""Models in MLflow's registry: a version points to what DVC keeps, and holds no copy of the weights.

The best model of a sparsity becomes a version whose source is ``dvc://PATH?out=OUTPUT&md5=HASH``: the model's folder,
the stage output that it lies in, and that output's hash in DVC's store. Aliases name the best version of every
sparsity, as ``best-20`` for 0.2; ``best`` is the one at the sparsity that the search was last asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from ffprune.core.errors import ChecksumMismatch, FfpruneError, MissingInput, ParameterError
from ffprune.stages.artifacts import read_json, require
from ffprune.stages.integrity import LOCK, content_hash
from ffprune.stages.lineage import git_state, made_hashes, read_hashes, read_lock
from ffprune.stages.record import DOWNLOADED, SUMMARY, maker_of
from ffprune.stages.table import best_rows
from ffprune.stages.tracking import Store

PULLED = Path("models") / "pulled"


class NotShared(FfpruneError):
    """A registered model whose files DVC cannot get here."""


@dataclass(frozen=True)
class Pointer:
    """Where DVC keeps a model's folder.

    Attributes:
        path: the folder, from the project's top.
        out: the stage output that it is, or lies in.
        md5: DVC's hash of that output.
    """

    path: str
    out: str
    md5: str

    def __str__(self) -> str:
        return f"dvc://{self.path}?{urlencode({'out': self.out, 'md5': self.md5}, safe='/')}"

    @classmethod
    def parse(cls, source: str) -> Pointer:
        """Read a version's source.

        Raises:
            ParameterError: it does not point to DVC's store.
        """
        parts = urlsplit(source)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        path, out, md5 = parts.netloc + parts.path, query.get("out", ""), query.get("md5", "")
        inside = PurePosixPath(path).is_relative_to(out) and ".." not in PurePosixPath(path).parts
        if parts.scheme != "dvc" or not out or out.startswith("/") or not inside or not _HASH.fullmatch(md5):
            raise ParameterError(
                f"the model version points to {source}",
                "ffprune gets what its own versions point to: dvc://PATH?out=OUTPUT&md5=HASH",
                "name a version that 'ffprune register' made, or get this one with the tool that made it",
            )
        return cls(path, out, md5)


_HASH = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True)
class Registered:
    """A version of this workspace's models.

    Attributes:
        aliases: that it holds now.
        new: whether it was made just now.
    """

    name: str
    version: str
    source: str
    aliases: tuple[str, ...]
    new: bool


def register_models(store: Store) -> list[Registered]:
    """The best measured model of every sparsity as a version; what is registered already stays as it is.

    An alias moves to a model of lower perplexity. Perplexities of another protocol (text, windows, number format) say
    nothing: then the alias moves as well.

    Raises:
        MissingInput: nothing was measured here, or not of the models that are here.
    """
    summary, lock = read_json(Path(SUMMARY)), read_lock(LOCK)
    hashes = _measured_outputs(lock)
    name = _model_name()
    # Another text may come to stand under the same name.
    text = read_hashes(lock, "evaluate").get(summary["protocol"]["text"])
    protocol = _key({"protocol": summary["protocol"], "text": text})
    client = store.client
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description="Versions point to DVC's store: ffprune pull-model gets one.")
    found = []
    for position, row in enumerate(best_rows(summary["rows"])):
        out = next((out for out in hashes if PurePosixPath(row["path"]).is_relative_to(out)), None)
        if out is None:
            raise MissingInput(
                f"{row['path']} was to be registered", "no output in dvc.lock has it", "run 'dvc repro', then again"
            )
        source = str(Pointer(row["path"], out, hashes[out]))
        tags = {
            **_tags(row),
            "protocol": protocol,
            "files": content_hash(require(Path(row["path"]))),
            **git_state(Path.cwd()),
        }
        version, new = _version(store, name, source, tags, row, summary)
        alias = _alias(row)
        holds = _give(client, name, alias, version, tags)
        if position == 0:
            client.set_registered_model_alias(name, "best", _aliases(client, name)[alias])
        held = (alias, *(["best"] if position == 0 else [])) if holds else ()
        found.append(Registered(name, str(version), source, held, new))
    return found


def register_after_report(store: Store) -> None:
    """Register what the stage report has just told of, where DVC knows the models."""
    # `ffprune report` typed by hand, or models made without DVC: there is nothing to point to.
    with suppress(MissingInput):
        register_models(store)


def pull_model(store: Store, reference: str, out: Path | None) -> Path:
    """Get a registered model's folder out of DVC's store, and check that it is the one that was registered.

    Args:
        store: where the registry is.
        reference: ``NAME@ALIAS`` or ``NAME@VERSION``.
        out: the folder to write; None: ``models/pulled/NAME-VERSION``.

    Raises:
        ParameterError: there is no such model, alias or version, or ``out`` exists.
        NotShared: DVC has no remote that holds the files, and neither has its cache.
        ChecksumMismatch: the files are not those that were registered.
    """
    version = find_version(store, reference)
    pointer = Pointer.parse(version.source)
    target = out if out is not None else PULLED / f"{version.name}-{version.version}"
    if target.exists():
        raise ParameterError(
            f"{reference} was to be written to {target}", "that exists", "remove it, or name another folder"
        )
    # DVC reads no .dvc file where git ignores files, as in models/.
    place = Path(tempfile.mkdtemp(prefix="pulling-", dir=Path.cwd()))
    try:
        folder = _fetch(pointer, place)
        found, registered = content_hash(folder), version.tags.get("files")
        if found != registered:
            raise ChecksumMismatch(
                f"{reference} was registered with files of checksum {registered}",
                f"DVC's store gave files of checksum {found} for {pointer.md5}",
                "the store or this cache is damaged: remove the object from the cache (and the remote), push again",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return target


def find_version(store: Store, reference: str) -> Any:
    """MLflow's version behind ``NAME@ALIAS`` or ``NAME@VERSION``.

    Raises:
        ParameterError: there is none; the message lists what there is.
    """
    name, _, wanted = reference.rpartition("@")
    models = sorted(model.name for model in store.client.search_registered_models())
    if name not in models:
        raise ParameterError(
            f"the model {name or reference!r} was asked for",
            f"registered are {', '.join(models) or 'none'}",
            "write NAME@best, NAME@best-20 or NAME@VERSION; 'ffprune register' registers what a workspace has measured",
        )
    versions = {str(v.version): v for v in store.client.search_model_versions(f"name = '{name}'")}
    aliases = _aliases(store.client, name)
    if aliases.get(wanted, wanted) not in versions:
        raise ParameterError(
            f"{reference} was asked for",
            f"{name} has the versions {', '.join(sorted(versions, key=int))} "
            f"and the aliases {', '.join(aliases) or 'none'}",
            "name one of these",
        )
    return versions[aliases.get(wanted, wanted)]


def _measured_outputs(lock: Mapping[str, Any]) -> dict[str, str]:
    """Outputs that hold models, as they were when they were measured: path -> DVC's hash."""
    measured = read_hashes(lock, "evaluate")
    models = {path: md5 for path, md5 in made_hashes(lock).items() if path in measured and path.startswith("models/")}
    if not models or any(measured[path] != md5 for path, md5 in models.items()):
        raise MissingInput(
            f"the models behind {SUMMARY} were to be registered",
            "dvc.lock does not know them: they were not made through DVC, or were made anew since they were measured",
            "run 'dvc repro', then again",
        )
    return models


def _model_name() -> str:
    """As the source calls it, without what MLflow allows in no name."""
    name = str(read_json(Path(DOWNLOADED))["model"]["name"]).rpartition("/")[2]
    return re.sub(r"[/:'\"%]", "-", name)


def _alias(row: Mapping[str, Any]) -> str:
    # MLflow allows no point in an alias.
    share = f"{100 * row['sparsity_target']:g}".replace(".", "_")
    return f"best-{share}" + ("" if row["budget"] == "parameters" else f"-{row['budget']}")


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    names = ("method", "granularity", "budget", "sparsity_target", "sparsity", "perplexity", "params", "bytes")
    ratio = row["perplexity"] / row["dense_perplexity"]
    return {**{name: str(row[name]) for name in names}, "ratio_to_dense": f"{ratio:.5f}"}


def _version(
    store: Store, name: str, source: str, tags: dict[str, str], row: Mapping[str, Any], summary: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The version of this very model and measurement; made where there is none."""
    same = ("files", "protocol", "perplexity")
    for known in store.client.search_model_versions(f"name = '{name}'"):
        if known.source == source and all(known.tags.get(tag) == tags[tag] for tag in same):
            return known.version, False
    protocol = summary["protocol"]
    about = (
        f"{row['method']} at {row['sparsity_target']:g} of {row['budget']}: perplexity {row['perplexity']:.3f}, dense "
        f"{row['dense_perplexity']:.3f} ({protocol['tokens']:,} tokens, {protocol['dtype']}, seed {protocol['seed']})"
    )
    made = store.client.create_model_version(
        name, source, run_id=_run_of(store, row["path"]), tags=tags, description=about, await_creation_for=0
    )
    return made.version, True


def _run_of(store: Store, path: str) -> str | None:
    """The run that made the model, where this store knows it: a colleague's may be in another."""
    record = Path("metrics/runs") / f"{maker_of(Path(path))}.json"
    run_id = read_json(record)["run_id"] if record.is_file() else None
    try:
        return str(store.client.get_run(run_id).info.run_id) if run_id else None
    except Exception:  # MLflow's own, one kind for local stores and another for servers
        return None


def _give(client: Any, name: str, alias: str, version: Any, tags: Mapping[str, str]) -> bool:
    """Whether the version holds the alias now: it is better than the holder, or measured otherwise."""
    holder = _aliases(client, name).get(alias)
    if holder not in (None, str(version)):
        held = client.get_model_version(name, holder).tags
        if held.get("protocol") == tags["protocol"] and float(held["perplexity"]) <= float(tags["perplexity"]):
            return False
    client.set_registered_model_alias(name, alias, str(version))
    return True


def _aliases(client: Any, name: str) -> dict[str, str]:
    """Alias -> version."""
    return {alias: str(version) for alias, version in (client.get_registered_model(name).aliases or {}).items()}


def _fetch(pointer: Pointer, place: Path) -> Path:
    """The folder behind a pointer, by way of a ``.dvc`` file for its output: of that, DVC gets the part asked for."""
    output = {"md5": pointer.md5, "hash": "md5", "path": "out"}
    (place / "out.dvc").write_text(json.dumps({"outs": [output]}))  # JSON is YAML
    wanted = place / "out" / PurePosixPath(pointer.path).relative_to(pointer.out)
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "pull", str(wanted)]
    # DVC's bars and errors go to the terminal as they come.
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if done.returncode or not wanted.is_dir():
        raise NotShared(
            f"{pointer.path} was asked of DVC's store, by the hash {pointer.md5}",
            "Neither the cache here nor a remote has it whole; what DVC said stands above",
            "Run 'dvc push' where it was made; 'dvc remote list' here must show where it went (docs/sharing.md)",
        )
    return wanted


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
