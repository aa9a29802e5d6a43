"""A headless Chromium, and a project in which a tiny pipeline has run while both servers were up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.servers import answers, free_ports
from tests.stages.tiny_project import MODELS, params, write_sources
from tests.toy import wait_until
from tests.workspace import Workspace

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A folder that outlives the tests, for people and for continuous integration; read before tests clear the variables.
SCREENSHOTS = os.environ.get("FFPRUNE_SCREENSHOTS")
COMMAND = ("-c", "from ffprune.cli import main; main()", "run")


@dataclass(frozen=True)
class Served:
    """A folder in which the pipeline ran twice, and the addresses of the pages that show it."""

    root: Path
    mlflow: str
    prefect: str

    def record(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "metrics" / "runs" / f"{stage}.json").read_text())
        return found


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    program, driver = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Without a sandbox: it cannot be set up by root, nor in most containers.
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver is named: selenium would look for one on the network.
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_window_size(1280, 1000)
    yield chrome
    chrome.quit()


@pytest.fixture
def screenshot(browser: webdriver.Chrome, tmp_path: Path) -> Callable[[str], None]:
    """Keeps a picture of what the browser shows, in the folder that FFPRUNE_SCREENSHOTS names."""
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> None:
        assert browser.save_screenshot(str(folder / f"{name}.png"))

    return keep


@pytest.fixture(scope="session")
def served(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    work = Workspace(root)
    write_sources(root, MODELS["llama"]())
    (root / "params.yaml").write_text(json.dumps(params().model_dump(mode="json")))
    mlflow, prefect = free_ports(2)
    ports = {"VENV_BIN": str(Path(sys.executable).parent), "MLFLOW_PORT": str(mlflow), "PREFECT_PORT": str(prefect)}
    found = Served(root, f"http://127.0.0.1:{mlflow}", f"http://127.0.0.1:{prefect}")
    servers = subprocess.Popen(["sh", "scripts/ui.sh"], cwd=root, env={**work.environment, **ports})
    try:
        for address in (f"{found.mlflow}/health", f"{found.prefect}/api/health"):
            assert wait_until(lambda address=address: answers(address), 120), address
        # The second time nothing has changed.
        work.run(*COMMAND)
        work.run(*COMMAND)
        yield found
    finally:
        servers.terminate()
        servers.wait(60)
