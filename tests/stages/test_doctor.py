"""What `ffprune doctor` finds in folders that are as they should be, and in others."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from ffprune.stages import doctor, graph
from ffprune.stages.doctor import Check, print_checks
from ffprune.stages.environment import QUIET_REPORTS, SERVER_FILE, quieten
from tests.servers import free_ports
from tests.toy import make_repo


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for name, quiet in QUIET_REPORTS.items():
        monkeypatch.setenv(name, quiet)
    make_repo(tmp_path, monkeypatch)
    quieten()
    return tmp_path


@pytest.fixture
def server() -> Iterator[str]:
    """Something that answers /health as Prefect and MLflow do."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def found(name: str) -> Check:
    (check,) = [check for check in doctor.examine(Path.cwd()) if check.name == name]
    return check


def test_a_project_as_it_should_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_checks(as_json=False)
    shown = capsys.readouterr().out
    assert "failed" not in shown
    assert "packages within the bounds" in shown
    assert print_checks(as_json=True)
    rows = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in rows}
    assert names >= {"parameters", "versions", "ffprune", "disk", "DVC", "remotes", "Prefect", "telemetry", "device"}
    assert all(row.keys() == {"name", "status", "found", "mend"} for row in rows)


def test_outside_a_project_it_fails_and_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not print_checks(as_json=False)
    shown = capsys.readouterr().out
    assert "failed   parameters:" in shown
    assert "-> change to the project's folder" in shown


def test_a_version_outside_its_bounds_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = ["numpy>=99", "not-a-package>=1", "pytest>=1; extra == 'dev'", "rich>=1"]
    monkeypatch.setattr(doctor, "requires", lambda name: bounds)
    check = found("versions")
    assert check.status == "failed"
    assert "(needs >=99)" in check.found
    assert "not-a-package missing" in check.found
    assert "rich" not in check.found


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1e9))
    assert (found("disk").status, found("disk").found[:6]) == ("failed", "1.0 GB")


def test_remotes_are_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(".dvc/config")
    (folder / "store").mkdir()
    config.write_text(
        config.read_text() + f"['remote \"here\"']\n    url = {folder}/store\n"
        f"['remote \"new\"']\n    url = {folder}/unmounted\n"
        f"['remote \"packed\"']\n    url = ssh://host/store\n"
    )
    assert found("remote here") == Check("remote here", "ok", "answers")
    # As it is before the first push, or without its mount.
    assert found("remote new").status == "warning"
    assert "unmounted is not there yet" in found("remote new").found
    assert "mount" in found("remote new").mend
    monkeypatch.setitem(sys.modules, "dvc_ssh", None)  # not installed
    assert found("remote packed").status == "failed"
    assert "pip install 'dvc[ssh]'" in found("remote packed").mend


def test_a_remote_whose_place_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(".dvc/config")
    config.write_text(config.read_text() + f"['remote \"gone\"']\n    url = {folder}/unmounted/store\n")
    monkeypatch.setattr(graph.os, "access", lambda place, mode: False)
    assert found("remote gone").status == "failed"
    assert f"{folder} cannot be written" in found("remote gone").found


def test_damaged_locks_of_dvc(folder: Path) -> None:
    Path(".dvc/tmp").mkdir(exist_ok=True)
    Path(".dvc/tmp/rwlock").write_text('{"/x": {"wri')
    assert found("DVC").status == "failed"
    assert "delete it" in found("DVC").mend


def test_servers_must_answer_where_they_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("PREFECT_API_URL", server)
    assert (found("MLflow").status, found("Prefect").status) == ("ok", "ok")
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (found("MLflow").status, found("Prefect").status) == ("failed", "failed")
    monkeypatch.delenv("PREFECT_API_URL")
    SERVER_FILE.parent.mkdir()
    SERVER_FILE.write_text("http://127.0.0.1:9/api\n")
    # As a crashed `make ui` leaves it; runs do without.
    assert found("Prefect").status == "warning"


def test_a_gpu_that_is_asked_for_must_be_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("device: cpu", "device: cuda", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("device").status == "failed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Some GPU")
    assert found("device") == Check("device", "ok", "cuda: Some GPU")
    Path("params.yaml").write_text(text.replace("device: cpu", "device: cuda:7", 1))
    assert found("device").status == "failed"
    assert "1 GPU here" in found("device").found


@pytest.mark.parametrize(("device", "check"), [("tpu", "parameters"), ("hpu", "device")])
def test_a_device_that_nobody_has(folder: Path, device: str, check: str) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("device: cpu", f"device: {device}", 1))
    assert found(check).status == "failed"
    assert device in found(check).found


@pytest.mark.parametrize("uri", ["mlruns", "file:///nowhere/mlruns", "nonsense://host"])
def test_a_store_that_mlflow_does_not_take(folder: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert found("MLflow").status == "failed"
    assert uri in found("MLflow").found
    assert "set tracking.uri" in found("MLflow").mend


def test_a_database_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://ada:secret@127.0.0.1:{free_ports(1)[0]}/runs")
    assert found("MLflow").status == "failed"
    assert "secret" not in found("MLflow").found


def test_other_code_than_the_projects(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "src" / "ffprune").mkdir(parents=True)
    (folder / "src" / "ffprune" / "__init__.py").write_text("")
    assert found("ffprune").status == "failed"
    assert "deactivate" in found("ffprune").mend
    # The command decides, not the process that looks.
    other = folder / "src" / "ffprune"
    monkeypatch.setattr(doctor, "_code_of", lambda command: other)
    assert found("ffprune").status == "ok"


def test_telemetry_that_somebody_switched_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    assert found("telemetry").status == "warning"
    assert "DO_NOT_TRACK=false" in found("telemetry").found


def test_telemetry_that_is_off_in_other_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, quiet in QUIET_REPORTS.items():
        monkeypatch.setenv(name, {"true": "1", "1": "True", "false": "0", "0": "0"}[quiet])
    assert found("telemetry").status == "ok"
