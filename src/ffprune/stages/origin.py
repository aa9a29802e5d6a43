"""Where a model folder comes from, as far as the folder itself and the project that it lies in know."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffprune.evaluate.footprint import safetensors_bytes
from ffprune.export.provenance import Provenance
from ffprune.models.card_metadata import card_metadata, license_of
from ffprune.stages.artifacts import read_json
from ffprune.stages.exhibits.results import is_dense, model_of
from ffprune.stages.lineage import content_key, made_hashes, read_hashes, read_lock
from ffprune.stages.record import (
    DECIDE,
    DENSE,
    FETCH,
    METHOD,
    PIPELINE_MODEL,
    PRUNED,
    REPAIRED,
    STAGES,
    SUMMARY,
    Stage,
    covers,
    dense_model,
    facts_of,
    stage_named,
)
from ffprune.stages.wording import (
    policy_facts,
    policy_text,
    recipe_facts,
    recipe_text,
    tested_on,
    text_words,
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

_PROTOCOL = ("windows", "seqlen", "tokens")
_NOTHING = {"pruning": "none"}
"""The method of a dense model."""


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
                return _of_pipeline(root, place, lock)
            if covers(METHOD.of(place.name).outs[0], place):
                return _of_method(root, place, lock)
            fetch = FETCH.of(place.name)
            if fetch.name in lock and place == Path(dense_model(place.name)):
                return replace(_of_source(root, place.name, lock, [fetch]), method=_NOTHING)
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


def _of_source(root: Path, model: str, lock: Mapping[str, Any], stages: list[Stage]) -> Provenance:
    """What is known of a dense model, and of the stages that a model made of it went through, the last of them last."""
    file = root / facts_of(model)
    facts: Mapping[str, Any] = read_json(file)["model"] if file.is_file() else {}
    records = _records(root, stages)
    return Provenance(
        name=str(facts.get("name", root.name)).rpartition("/")[2],
        license=_text(facts.get("license")),
        source={said: str(facts[key]) for key, said in _SOURCE.items() if facts.get(key) is not None},
        base_model=_text(facts.get("name")) if facts.get("kind") == "hub" else None,
        params=_params(lock, stages),
        runs={name: str(record["run_id"]) for name, record in records.items()},
        version=_text(records.get(stages[-1].name, {}).get("version.ffprune")),
    )


def _of_pipeline(root: Path, place: Path, lock: Mapping[str, Any]) -> Provenance:
    known = _of_source(root, PIPELINE_MODEL, lock, _makers(place))
    results = _results(root, place, lock)
    tested = [] if results is None else [tested_on(results["protocol"])]
    beside = root / place.with_name(f"{place.name}.json")
    if covers(DENSE, place):
        return replace(known, method=_NOTHING, data=tested, results=results)
    method = read_json(beside) if beside.is_file() else {}
    words = [known.name, place.name, *([f"{method['sparsity_target']:g}"] if method else [])]
    return replace(
        known,
        name="-".join(words),
        method=policy_facts(place.name, method, known.params) if method else {},
        data=[*text_words(known.params), *policy_text(place.name, known.params), *tested],
        results=results,
    )


def _of_method(root: Path, place: Path, lock: Mapping[str, Any]) -> Provenance:
    """Of a model that a recipe kept: what its own result says, which the stage wrote beside it."""
    name, stage = place.name, METHOD.of(place.name)
    file = root / stage.metrics[0]
    if not file.is_file():
        asked = _params(lock, [stage]).get("methods", {}).get(name, {})
        return _of_source(root, asked.get("model", PIPELINE_MODEL), lock, [DECIDE.of(name), stage])
    result = read_json(file)
    model, recipe = model_of(result), result["recipe"]
    fetched = [] if model == PIPELINE_MODEL else [FETCH.of(model)]
    known = _of_source(root, model, lock, [stage_named("download"), *fetched, DECIDE.of(name), stage])
    # The model that the project's own section names is another one.
    params = {key: value for key, value in known.params.items() if key != "model" or not fetched}
    results = _method_results(root, place, lock, result)
    tested = [] if results is None else [tested_on(text) for text in results["texts"]]
    return replace(
        known,
        name="-".join([known.name, name, *([f"{recipe['sparsity']:g}"] if recipe["sparsity"] else [])]),
        method=recipe_facts(name, result),
        data=[*text_words(params), *recipe_text(recipe, params), *tested],
        params=params,
        results=results,
    )


def _makers(place: Path) -> list[Stage]:
    """The stages that a model went through, from the first."""
    last = next(stage.name for stage in STAGES if any(covers(out, place) for out in stage.outs))
    names = [stage.name for stage in STAGES]
    return list(STAGES[: names.index(last) + 1])


def _params(lock: Mapping[str, Any], stages: list[Stage]) -> dict[str, Any]:
    """Sections of params.yaml as they were when the stages ran, nested as there.

    A stage may read one value of a section: dvc.lock has it under a name with dots.
    """
    params: dict[str, Any] = {}
    for stage in stages:
        for name, value in lock.get(stage.name, {}).get("params", {}).get("params.yaml", {}).items():
            *outer, last = name.split(".")
            section = params
            for part in outer:
                section = section.setdefault(part, {})
            section[last] = deepcopy(value)
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


def _method_results(
    root: Path, place: Path, lock: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the stage measured of the model that it kept; None if the result or the folder is not that of dvc.lock."""
    stage = METHOD.of(place.name)
    outs = {out["path"]: out for out in lock.get(stage.name, {}).get("outs", [])}
    folder, file = outs.get(place.as_posix()), outs.get(stage.metrics[0])
    size = sum(path.stat().st_size for path in (root / place).rglob("*") if path.is_file())
    if folder is None or file is None or folder.get("size") != size:
        return None
    if file.get("md5") != content_key(root / stage.metrics[0]):
        return None
    paths = _params(lock, [stage]).get("study", {}).get("texts", {})
    dense = _dense_result(root, result)
    texts = [
        {
            "text": str(paths.get(name, name)),
            **{key: found[key] for key in (*_PROTOCOL, "stderr")},
            "perplexity": found["value"],
            "dense": _beside(found, dense.get(name)),
        }
        for name, found in result["perplexity"].items()
    ]
    kept = ("dtype", "seed", "params_before", "params_after", "zero_shot", "speed")
    return {"texts": texts, **{key: result[key] for key in kept}}


def _beside(found: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
    """The dense model's perplexity, if it was measured on the same windows."""
    return None if dense is None or any(dense.get(key) != found[key] for key in _PROTOCOL) else dense["value"]


def _dense_result(root: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexities of the dense model by text, if a method measured it by the same number format and seed."""
    for file in sorted((root / METHOD.of("any").metrics[0]).parent.glob("*.json")):
        other = read_json(file)
        alike = model_of(other) == model_of(result) and all(other.get(key) == result[key] for key in ("dtype", "seed"))
        if is_dense(other) and alike:
            found: dict[str, Any] = other["perplexity"]
            return found
    return {}


def _records(root: Path, stages: list[Stage]) -> dict[str, dict[str, Any]]:
    """What the runs of stages noted of themselves, by the stage's name."""
    files = {stage.name: root / stage.run_record for stage in stages}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}
