"""The pages of MLflow and Prefect after a run, as a person opens them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from ffprune.stages.record import STAGES
from tests.browser.conftest import Served

pytestmark = pytest.mark.slow
NAMES = [stage.name for stage in STAGES]


def shown(browser: webdriver.Chrome, pattern: str) -> str:
    """The text of the page as soon as the pattern is in it."""

    def text() -> str:
        return browser.find_element(By.TAG_NAME, "body").text

    WebDriverWait(browser, 60).until(lambda _: re.search(pattern, text()), f"{pattern} in {browser.current_url}")
    return text()


def run_page(served: Served, run_id: str) -> str:
    with urllib.request.urlopen(f"{served.mlflow}/api/2.0/mlflow/runs/get?run_id={run_id}") as answer:
        experiment = json.load(answer)["run"]["info"]["experiment_id"]
    return f"{served.mlflow}/#/experiments/{experiment}/runs/{run_id}"


def flow_runs(served: Served) -> list[str]:
    """Identifiers of the runs of the flow, from the first."""
    request = urllib.request.Request(
        f"{served.prefect}/api/flow_runs/filter",
        data=json.dumps({"sort": "START_TIME_ASC"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return [run["id"] for run in json.load(answer)]


def test_mlflow_shows_the_run_and_what_every_stage_did(
    browser: webdriver.Chrome, served: Served, screenshot: Callable[[str], None]
) -> None:
    browser.get(run_page(served, served.record("report")["parent_run_id"]))
    text = shown(browser, r"stage\.report\s*: ran")
    screenshot("mlflow-run")
    assert "Finished" in text
    assert all(re.search(rf"stage\.{name}\s*: ran", text) for name in NAMES)


def test_mlflow_shows_the_policy(browser: webdriver.Chrome, served: Served, screenshot: Callable[[str], None]) -> None:
    browser.get(f"{run_page(served, served.record('search')['run_id'])}/artifacts/policy.png")
    image = WebDriverWait(browser, 60).until(
        lambda _: next(
            (
                found
                for found in browser.find_elements(By.CSS_SELECTOR, "img[alt='policy.png']")
                if found.get_property("naturalWidth")
            ),
            None,
        )
    )
    screenshot("mlflow-policy")
    assert image.is_displayed()
    # 9 by 5.6 inches at matplotlib's 100 dots: the figure, not a broken picture's symbol.
    assert (image.get_property("naturalWidth"), image.get_property("naturalHeight")) == (900, 560)


def test_mlflow_shows_the_report(browser: webdriver.Chrome, served: Served, screenshot: Callable[[str], None]) -> None:
    browser.get(f"{run_page(served, served.record('report')['run_id'])}/artifacts/report.html")
    frame = WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.TAG_NAME, "iframe"))[0]
    browser.switch_to.frame(frame)
    try:
        WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#policy-1 svg .bars path"))
        assert "of the prunable weights removed" in browser.find_element(By.TAG_NAME, "main").text
    finally:
        browser.switch_to.default_content()
    screenshot("mlflow-report")


@pytest.mark.parametrize(("number", "state"), [(0, "Completed"), (1, "Cached")])
def test_prefect_shows_the_state_of_every_stage(
    browser: webdriver.Chrome, served: Served, screenshot: Callable[[str], None], number: int, state: str
) -> None:
    browser.get(f"{served.prefect}/runs/flow-run/{flow_runs(served)[number]}")
    shown(browser, rf"{len(NAMES)} Task runs")
    browser.find_element(By.ID, "task-runs").click()
    text = shown(browser, rf"(?s)report-\w+\s+{state}.*download-\w+\s+{state}")
    screenshot(f"prefect-{state.lower()}")
    assert all(re.search(rf"{name}-\w+\s+{state}", text) for name in NAMES)


def test_prefect_links_to_the_report(browser: webdriver.Chrome, served: Served) -> None:
    browser.get(f"{served.prefect}/artifacts/key/report")
    # The newest stands first.
    browser.get(link(browser, "/artifacts/artifact/"))
    assert link(browser, f"/runs/{served.record('report')['run_id']}/artifacts/report.html")


def link(browser: webdriver.Chrome, part: str) -> str:
    """The first address with this part, as soon as the page has it."""

    def found(_: object) -> str | None:
        addresses = (str(one.get_attribute("href")) for one in browser.find_elements(By.TAG_NAME, "a"))
        return next((address for address in addresses if part in address), None)

    wait = WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])
    return str(wait.until(found, f"a link to {part} in {browser.current_url}"))
