"""MLflow's registry of models: a version points to what DVC keeps, and holds no copy of the weights.

A version's source is ``dvc://PATH?out=OUTPUT&md5=HASH``: the model's folder, the stage output that it lies in, and that
output's hash in DVC's store.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from ffprune.core.errors import ChecksumMismatch, FfpruneError, ParameterError
from ffprune.models.temporary import neighbour, remove_leftovers
from ffprune.stages.integrity import content_hash
from ffprune.stages.tracking import Store

PULLED = Path("models") / "pulled"


class NotShared(FfpruneError):
    """A registered model whose files DVC cannot get here."""


@dataclass(frozen=True)
class Pointer:
    """Where DVC keeps a model's folder.

    Attributes:
        path: the folder, from the top of the project or study that made it.
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
    remove_leftovers(Path.cwd())
    place = neighbour(Path.cwd() / "pulled")
    place.mkdir()
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
            "write NAME@best, NAME@best-20, NAME@method-METHOD or NAME@VERSION; 'ffprune register' registers what a "
            "workspace has measured",
        )
    versions = {str(v.version): v for v in store.client.search_model_versions(f"name = '{name}'")}
    aliases = aliases_of(store.client, name)
    if aliases.get(wanted, wanted) not in versions:
        raise ParameterError(
            f"{reference} was asked for",
            f"{name} has the versions {', '.join(sorted(versions, key=int))} "
            f"and the aliases {', '.join(aliases) or 'none'}",
            "name one of these",
        )
    return versions[aliases.get(wanted, wanted)]


def aliases_of(client: Any, name: str) -> dict[str, str]:
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
