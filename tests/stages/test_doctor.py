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

from ffprune.stages import doctor
from ffprune.stages.doctor import Check, print_checks
from ffprune.stages.environment import QUIET_REPORTS, SERVER_FILE, quieten
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


def test_remotes_are_asked(folder: Path) -> None:
    config = Path(".dvc/config")
    (folder / "store").mkdir()
    config.write_text(
        config.read_text() + f"['remote \"here\"']\n    url = {folder}/store\n"
        f"['remote \"gone\"']\n    url = {folder}/unmounted\n"
    )
    assert found("remote here") == Check("remote here", "ok", "answers")
    assert found("remote gone").status == "failed"
    assert "unmounted is not there" in found("remote gone").found


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


def test_telemetry_that_somebody_switched_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    assert found("telemetry").status == "warning"
    assert "DO_NOT_TRACK=false" in found("telemetry").found
