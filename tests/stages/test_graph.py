"""What is relied on of DVC's internal API."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.graph import cache_folder, read_plan
from tests.toy import DVC, REPO, make_repo


@pytest.mark.slow
def test_order_edges_and_staleness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_repo(tmp_path, monkeypatch)
    plan = read_plan(root)
    order = list(plan.upstream)
    assert order[0] == "a"
    assert order[-1] == "d"
    assert {name: set(up) for name, up in plan.upstream.items()} == {
        "a": set(),
        "b": {"a"},
        "c": {"a"},
        "d": {"b", "c"},
    }
    assert plan.stale == {"a", "b", "c", "d"}
    subprocess.run([*DVC, "repro", "--quiet"], check=True)
    assert read_plan(root).stale == frozenset()
    Path("c.in").write_text("2")
    assert read_plan(root).stale == {"c"}
    only_b = read_plan(root, ["b"])
    assert set(only_b.upstream) == {"a", "b"}
    assert only_b.stale == frozenset()
    with pytest.raises(ParameterError, match=r"dvc\.yaml has"):
        read_plan(root, ["e"])


def test_a_study_and_its_project_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_repo(tmp_path, monkeypatch)
    study = root / "studies" / "tiny"
    study.mkdir(parents=True)
    (study / "dvc.yaml").write_text(
        """
stages:
  method: {foreach: {x: 1, y: 2}, do: {cmd: "cp ../../a.txt ${key}", deps: [../../a.txt], outs: ["${key}"]}}
"""
    )
    assert set(read_plan(root).upstream) == set("abcd")
    monkeypatch.chdir(study)
    # What its stages need of the project comes along, by the name DVC gives it here.
    assert set(read_plan(study).upstream) == {"method@x", "method@y", "../../dvc.yaml:a"}
    assert set(read_plan(study, ["method@x"]).upstream) == {"method@x", "../../dvc.yaml:a"}


def test_data_that_dvc_keeps_is_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    root = make_repo(tmp_path, monkeypatch)
    (root / "documents.jsonl").write_text("{}")
    with Repo(str(root)) as repo:
        repo.add("documents.jsonl")
    (root / "documents.jsonl").write_text("{}{}")
    plan = read_plan(root)
    assert set(plan.upstream) == set("abcd")
    assert not any("documents" in name for name in plan.stale)


def test_dvc_reads_the_projects_own_pipeline() -> None:
    order = list(read_plan(REPO).upstream)
    assert order.index("prune") < order.index("ridge") < order.index("evaluate") < order.index("report")


def test_outside_a_dvc_repository_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"nor one above it is a DVC repository. change to the project's folder"):
        cache_folder(tmp_path)
