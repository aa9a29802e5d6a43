"""Where a model folder comes from, as far as the folder itself and the project that it lies in know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffprune.evaluate.footprint import safetensors_bytes
from ffprune.export.provenance import Provenance
from ffprune.models.card_metadata import card_metadata, license_of
from ffprune.stages.artifacts import read_json
from ffprune.stages.lineage import made_hashes, read_hashes, read_lock
from ffprune.stages.record import (
    DENSE,
    FETCH,
    PIPELINE_MODEL,
    PRUNED,
    REPAIRED,
    STAGES,
    SUMMARY,
    Stage,
    covers,
    dense_model,
    facts_of,
)

#: Facts of a dense model that identify the source model, with what a model card calls them.
_SOURCE = {
    "name": "name",
    "source": "source",
    "revision": "revision",
    "file": "file",
    "sha256": "SHA-256 of the file",
    "quantization": "stored as",
    "architecture": "architecture",
    "parameters": "parameters",
    "storage_dtype": "taken as",
}


def origin_of(folder: Path) -> Provenance:
    """What is known of a model folder.

    A project (a folder with dvc.lock above the model's) knows its models: by which stage, from what source, with which
    parameters they were made, and what was measured of them. Of any other folder, its own README.md is read.
    """
    folder = folder.resolve()
    for root in folder.parents:
        if (root / "dvc.lock").is_file():
            place, lock = folder.relative_to(root), read_lock(root / "dvc.lock")
            if any(covers(out, place) for out in (DENSE, PRUNED, REPAIRED)):
                return _of_project(root, place, lock, PIPELINE_MODEL, _makers(place))
            fetch = FETCH.of(place.name)
            if fetch.name in lock and place == Path(dense_model(place.name)):
                return _of_project(root, place, lock, place.name, [fetch])
    told = card_metadata(folder)
    base = _text(told.get("base_model"))
    return Provenance(
        folder.name,
        license=license_of(told),
        source={} if base is None else {"base model": base},
        base_model=base,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _of_project(root: Path, place: Path, lock: Mapping[str, Any], model: str, stages: list[Stage]) -> Provenance:
    file = root / facts_of(model)
    facts: Mapping[str, Any] = read_json(file)["model"] if file.is_file() else {}
    beside = root / place.with_name(f"{place.name}.json")
    method = read_json(beside) if not covers(DENSE, place) and beside.is_file() else {}
    words = [str(facts.get("name", root.name)).rpartition("/")[2]]
    words += [place.name, f"{method['sparsity_target']:g}"] if method else []
    return Provenance(
        name="-".join(words),
        license=_text(facts.get("license")),
        source={said: str(facts[key]) for key, said in _SOURCE.items() if facts.get(key) is not None},
        base_model=_text(facts.get("name")) if facts.get("kind") == "hub" else None,
        method=_method(place.name, method),
        params=_params(lock, stages),
        results=_results(root, place, lock),
        runs=_runs(root, stages),
    )


def _makers(place: Path) -> list[Stage]:
    """The stages that a model went through, from the first."""
    last = next(stage.name for stage in STAGES if any(covers(out, place) for out in stage.outs))
    names = [stage.name for stage in STAGES]
    return list(STAGES[: names.index(last) + 1])


def _method(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    if not facts:
        return {}
    policy, _, repair = name.partition("+")
    removed = {f"{cost} removed": f"{share:.2%}" for cost, share in facts.get("removed", {}).items()}
    return {
        "policy": policy,
        "repair": repair or "none",
        "granularity": str(facts["granularity"]),
        "budget": str(facts.get("budget", "parameters")),
        "target": f"{facts['sparsity_target']:g} of the budget",
        "sparsity": f"{facts['sparsity']:.4f} of the prunable weights",
        **removed,
    }


def _params(lock: Mapping[str, Any], stages: list[Stage]) -> dict[str, Any]:
    """Sections of params.yaml as they were when the stages ran."""
    params: dict[str, Any] = {}
    for stage in stages:
        params |= lock.get(stage.name, {}).get("params", {}).get("params.yaml", {})
    return params


def _results(root: Path, place: Path, lock: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of these very files; None: nothing, or of others than those that are there."""
    if not (root / SUMMARY).is_file():
        return None
    measured, made = read_hashes(lock, "evaluate"), made_hashes(lock)
    if any(measured.get(out) != made.get(out) for out in (DENSE, PRUNED, REPAIRED) if covers(out, place)):
        return None
    summary = read_json(root / SUMMARY)
    rows = [summary["dense"], *summary["rows"]]
    row = next((row for row in rows if row.get("path") == place.as_posix()), None)
    if row is None or row["bytes"] != safetensors_bytes(root / place):
        return None
    return {"protocol": summary["protocol"], "dense": summary["dense"], "row": row}


def _runs(root: Path, stages: list[Stage]) -> dict[str, str]:
    files = {stage.name: root / stage.run_record for stage in stages}
    return {name: str(read_json(file)["run_id"]) for name, file in files.items() if file.is_file()}
