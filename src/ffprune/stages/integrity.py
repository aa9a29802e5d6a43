"""Whether files are what dvc.lock says: DVC trusts its cache, and would take a damaged entry for the right one."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml

import ffprune
from ffprune.core.errors import ChecksumMismatch, MissingInput
from ffprune.stages.lineage import recorded_hashes
from ffprune.stages.record import maker_of

LOCK = Path("dvc.lock")
_FOLDER = ".dir"
#: A file's MD5, hexadecimal.
Md5 = Callable[[Path], str]


def md5(path: Path) -> str:
    """MD5 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def content_hash(path: Path, md5: Md5 = md5) -> str:
    """The hash that dvc.lock records: MD5 of a file; of a folder, that of DVC's list of its files, and ``.dir``."""
    if not path.is_dir():
        return md5(path)
    inside = {file.relative_to(path).as_posix(): md5(file) for file in path.rglob("*") if file.is_file()}
    entries = [{"md5": key, "relpath": name} for name, key in sorted(inside.items())]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + _FOLDER


def check_code(project: Path, code: Path | None = None) -> None:
    """Refuse to run other code than that of the project, which DVC hashes: that of another environment on the path.

    A project without sources, and the temporary copy of an experiment, whose sources are the same, pass.

    Args:
        project: the project's folder.
        code: the package that stages would run; the one that is running if none is named.

    Raises:
        ChecksumMismatch: names both.
    """
    hashed, running = project / "src" / "ffprune", code or Path(ffprune.__path__[0])
    if hashed.is_dir() and hashed.resolve() != running.resolve() and _sources(hashed) != _sources(running):
        raise ChecksumMismatch(
            f"the project's code is in {hashed}, and the ffprune that was started has other code, in {running}",
            "DVC would record what it makes as made by the project's",
            "activate the project's own environment, or leave the other one (deactivate); 'make run' needs neither",
        )


def _sources(package: Path) -> dict[str, str]:
    files = (file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(package).as_posix(): md5(file) for file in files}


def check_inputs(deps: Iterable[str]) -> None:
    """Refuse inputs whose bytes are not those that the stages before have made, as dvc.lock records them.

    Inputs that no stage made are not recorded, and pass.

    Raises:
        ChecksumMismatch: names the inputs and the stages that make them.
    """
    made = recorded_hashes(LOCK)
    found = {dep: content_hash(Path(dep)) for dep in deps if dep in made}

    def wrong() -> list[str]:
        recorded = recorded_hashes(LOCK)
        return [dep for dep, key in found.items() if recorded.get(dep) != key]

    if wrong():
        # A stage that has just ended beside this one may be writing dvc.lock, which DVC does in place.
        time.sleep(1)
    if damaged := wrong():
        makers = sorted({str(maker_of(Path(dep))) for dep in damaged})
        raise ChecksumMismatch(
            f"{', '.join(damaged)}: the bytes are not those that dvc.lock records",
            "the cache or the remote is damaged, or the files were changed by hand",
            "run 'ffprune verify', which tells which; to keep a change of your own: "
            f"'dvc commit -f {' '.join(makers)}', then run again",
        )


def verify(cache: Path, drop: bool, as_json: bool = False) -> None:
    """Read every output of the current folder's dvc.lock, and its entry in DVC's cache; say what is not as recorded.

    Args:
        cache: DVC's cache folder.
        drop: delete damaged entries, and the workspace's files that hold the same bytes.
        as_json: say it in JSON, before any refusal.

    Raises:
        MissingInput: there is no dvc.lock.
        ChecksumMismatch: an entry was damaged, or an output is another than recorded.
    """
    if not LOCK.is_file():
        raise MissingInput(
            f"the outputs in {Path.cwd()} were to be compared with {LOCK}",
            "there is no such file: no stage has run here",
            "change to the project's folder or to a study in it, or run the pipeline first",
        )
    hashes, known = recorded_hashes(LOCK), _ReadOnce()
    objects = _damaged(cache, hashes.values(), known)
    damaged = [*objects, *_broken_runs(cache)]
    # With links, entry and output are one file; with copies, the output may hold what the damaged entry holds.
    bad = {known(entry) for entry in objects}
    here = {path: key for path, key in hashes.items() if Path(path).exists()}
    held = [file for path in here for file in _files(Path(path)) if bad and known(file) in bad]
    changed = [
        path
        for path, key in here.items()
        if content_hash(Path(path), known) != key and not bad.intersection(map(known, _files(Path(path))))
    ]
    absent = [path for path in hashes if path not in here]
    if as_json:
        told = {"damaged": [str(file) for file in (*damaged, *held)], "changed": changed, "absent": absent}
        print(json.dumps({"outputs": len(here), "bytes": known.bytes, **told, "dropped": drop}, indent=2))
    else:
        print(f"{len(here)} outputs compared with {LOCK}, {known.bytes / 1e9:.2f} GB read with their cache entries")
        if absent:
            print(f"not here: {', '.join(absent)}")
    for file in [*damaged, *held] if drop else []:
        file.unlink(missing_ok=True)
    if damaged:
        names = ", ".join(map(str, [*damaged, *held]))
        done, again = ("deleted", "") if drop else ("found", "'ffprune verify --drop', then ")
        raise ChecksumMismatch(
            f"{done}, damaged: {len(damaged)} of DVC's cache entries, and what holds them: {names}",
            "DVC would take them for the right ones",
            f"run {again}'dvc repro --pull' to get or make them again; if they come back damaged, so is the remote",
        )
    if changed:
        raise ChecksumMismatch(
            f"{', '.join(changed)}: not what {LOCK} records",
            "their cache entries are whole: the files were changed, made without DVC, or belong to another dvc.lock",
            "run 'dvc checkout -f PATH' to have the recorded ones again, or 'dvc commit -f STAGE' to keep these",
        )


class _ReadOnce:
    """MD5 of files; one that has several names is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}
        self.bytes = 0

    def __call__(self, path: Path) -> str:
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in self._known:
            self._known[key] = md5(path)
            self.bytes += stat.st_size
        return self._known[key]


def _damaged(cache: Path, hashes: Iterable[str], md5: Md5) -> list[Path]:
    """Entries whose bytes are not what their names say; those that are not there are not damaged."""
    waiting, found = set(hashes), set()
    while waiting:
        key = waiting.pop()
        entry = _entry(cache, key)
        if not entry.is_file():
            continue
        if md5(entry) != key.removesuffix(_FOLDER):
            found.add(entry)
        elif key.endswith(_FOLDER):
            waiting.update(item["md5"] for item in json.loads(entry.read_text()))
    return sorted(found)


def _broken_runs(cache: Path) -> Iterator[Path]:
    """Entries of the run cache that were cut short: DVC fails on them without a word on why."""
    for entry in sorted(cache.glob("runs/*/*/*")):
        try:
            run = yaml.safe_load(entry.read_text())
        except (yaml.YAMLError, ValueError):
            run = None
        if not (isinstance(run, dict) and "outs" in run):
            yield entry


def _entry(cache: Path, key: str) -> Path:
    return cache / "files" / "md5" / key[:2] / key[2:]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
