"""What a project has measured, entered into MLflow's registry (:mod:`ffprune.stages.registry`).

The best model of a sparsity becomes a version with the alias ``best-20`` for 0.2; ``best`` is the one at the sparsity
that the search was last asked for. A method that keeps its model (``save``) has a version too: ``method-NAME``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ffprune.core.errors import MissingInput
from ffprune.evaluate.footprint import safetensors_bytes
from ffprune.stages.artifacts import read_json, require
from ffprune.stages.execution import model_named
from ffprune.stages.exhibits.results import model_of, results_of, text_of
from ffprune.stages.integrity import LOCK, content_hash
from ffprune.stages.lineage import content_key, git_state, made_hashes, read_hashes, read_lock
from ffprune.stages.params import load_params
from ffprune.stages.record import METHOD, PIPELINE_MODEL, SUMMARY, facts_of, maker_of
from ffprune.stages.registry import Pointer, aliases_of
from ffprune.stages.table import best_rows
from ffprune.stages.tracking import Store


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


@dataclass(frozen=True)
class _Model:
    """A measured model that DVC keeps.

    Attributes:
        dense: what it was pruned from, by the name that a recipe gives it.
        pointer: to DVC's store.
        row: what was measured, as a row of metrics/summary.json.
        protocol: how.
        text: DVC's hash of the test text: another text may come to stand under the same name.
        aliases: that it asks for.
        contested: whether a better version keeps them; else the newest has them.
    """

    dense: str
    pointer: Pointer
    row: Mapping[str, Any]
    protocol: Mapping[str, Any]
    text: str | None
    aliases: tuple[str, ...]
    contested: bool


def register_models(store: Store) -> list[Registered]:
    """The best measured model of every sparsity, and every kept method's, as a version; known ones stay as they are.

    An alias of the best moves to a model of lower perplexity. Perplexities of another protocol (text, windows, number
    format) say nothing: then the alias moves as well.

    Raises:
        MissingInput: nothing was measured here, or not of the models that are here.
    """
    kept = list(_kept_methods())
    # Methods may be all that was measured.
    measured = [] if kept and not Path(SUMMARY).is_file() else list(_best_of_pipeline())
    return [_register(store, model) for model in (*measured, *kept)]


def register_if_any(store: Store) -> None:
    """Register what has just been measured, where DVC knows the models."""
    # `ffprune report` typed by hand, or models made without DVC: there is nothing to point to.
    with suppress(MissingInput):
        register_models(store)


def _best_of_pipeline() -> Iterator[_Model]:
    summary, lock = read_json(Path(SUMMARY)), read_lock(LOCK)
    hashes = _measured_outputs(lock)
    protocol = summary["protocol"]
    text = read_hashes(lock, "evaluate").get(protocol["text"])
    for position, row in enumerate(best_rows(summary["rows"])):
        out = next((out for out in hashes if PurePosixPath(row["path"]).is_relative_to(out)), None)
        if out is None:
            raise MissingInput(
                f"{row['path']} was to be registered", "no output in dvc.lock has it", "run 'dvc repro', then again"
            )
        aliases = (_alias(row), *(["best"] if position == 0 else []))
        yield _Model(PIPELINE_MODEL, Pointer(row["path"], out, hashes[out]), row, protocol, text, aliases, True)


def _kept_methods() -> Iterator[_Model]:
    """Of the section ``methods``, as dvc.lock knows them."""
    params, lock = load_params(), read_lock(LOCK)
    hashes = made_hashes(lock)
    for name, result in results_of(Path(), params.methods).items():
        stage = METHOD.of(name)
        (folder,), (file,) = stage.outs, stage.metrics
        text = text_of([result], tuple(params.study.texts))
        # A run that was stopped between its files and dvc.lock left what the lock does not know.
        known = folder in hashes and hashes.get(file) == content_key(Path(file))
        # Recipes are older than the choice to save.
        kept = known and result["recipe"].get("save", False)
        if not kept or text is None or result["perplexity"][text]["value"] is None:
            continue
        found = result["perplexity"][text]
        row = {
            "method": name,
            "granularity": result["granularity"],
            "budget": "parameters",
            "sparsity_target": result["recipe"]["sparsity"],
            "sparsity": result["sparsity"],
            "perplexity": found["value"],
            "dense_perplexity": found["dense"],
            "params": result["params_after"],
            "bytes": safetensors_bytes(Path(folder)),
            "path": folder,
        }
        protocol = {
            "text": str(params.study.texts[text]),
            **{key: found[key] for key in ("windows", "seqlen", "tokens")},
            **{key: result[key] for key in ("dtype", "seed")},
        }
        yield _Model(
            model_of(result),
            Pointer(folder, folder, hashes[folder]),
            row,
            protocol,
            read_hashes(lock, stage.name).get(protocol["text"]),
            (f"method-{name}",),
            False,
        )


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


def _register(store: Store, model: _Model) -> Registered:
    client, name = store.client, _model_name(model.dense)
    if not any(known.name == name for known in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description="Versions point to DVC's store: ffprune pull-model gets one.")
    tags = {
        **_tags(model.row),
        "protocol": _key({"protocol": model.protocol, "text": model.text}),
        "files": content_hash(require(Path(model.pointer.path))),
        **git_state(Path.cwd()),
    }
    version, new = _version(store, name, model, tags)
    alias, *others = model.aliases
    if model.contested:
        holds = _give(client, name, alias, version, tags)
    else:
        # Several studies may keep a method of one name: the alias stays where it was put last.
        if new:
            client.set_registered_model_alias(name, alias, str(version))
        holds = aliases_of(client, name).get(alias) == str(version)
    for other in others:
        client.set_registered_model_alias(name, other, aliases_of(client, name)[alias])
    return Registered(name, str(version), str(model.pointer), model.aliases if holds else (), new)


def _model_name(dense: str) -> str:
    """As the source calls it, without what MLflow allows in no name."""
    name = model_named(require(Path(facts_of(dense))))["model"].rpartition("/")[2]
    return re.sub(r"[/:'\"%]", "-", name)


def _alias(row: Mapping[str, Any]) -> str:
    # MLflow allows no point in an alias.
    share = f"{100 * row['sparsity_target']:g}".replace(".", "_")
    return f"best-{share}" + ("" if row["budget"] == "parameters" else f"-{row['budget']}")


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    names = ("method", "granularity", "budget", "sparsity_target", "sparsity", "perplexity", "params", "bytes")
    dense = row["dense_perplexity"]
    # Of a method whose dense model was not measured beside it, there is no ratio.
    ratio = {} if dense is None else {"ratio_to_dense": f"{row['perplexity'] / dense:.5f}"}
    return {**{name: str(row[name]) for name in names}, **ratio}


def _version(store: Store, name: str, model: _Model, tags: dict[str, str]) -> tuple[Any, bool]:
    """The version of this very model and measurement; made where there is none."""
    source, row, protocol = str(model.pointer), model.row, model.protocol
    same = ("files", "protocol", "perplexity")
    for known in store.client.search_model_versions(f"name = '{name}'"):
        if known.source == source and all(known.tags.get(tag) == tags[tag] for tag in same):
            return known.version, False
    dense = "" if row["dense_perplexity"] is None else f", dense {row['dense_perplexity']:.3f}"
    about = (
        f"{row['method']} at {row['sparsity_target']:g} of {row['budget']}: perplexity {row['perplexity']:.3f}{dense} "
        f"({protocol['tokens']:,} tokens, {protocol['dtype']}, seed {protocol['seed']})"
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
    holder = aliases_of(client, name).get(alias)
    if holder not in (None, str(version)):
        held = client.get_model_version(name, holder).tags
        if held.get("protocol") == tags["protocol"] and float(held["perplexity"]) <= float(tags["perplexity"]):
            return False
    client.set_registered_model_alias(name, alias, str(version))
    return True


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
