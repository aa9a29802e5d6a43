"""The report as a file in a browser: alone, on a phone, on paper."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from ffprune.stages.record import PAGE
from tests.browser.conftest import Served

pytestmark = pytest.mark.slow
#: What stands out on the right; boxes that scroll, and drawings that are clipped, may be wider within.
TOO_WIDE = """
return [...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll > *, pre > *, svg *"))
    .map(e => e.tagName + "." + e.getAttribute("class"));
"""


@pytest.fixture
def page(browser: webdriver.Chrome, served: Served) -> Iterator[webdriver.Chrome]:
    browser.get_log("performance")  # what was before
    browser.get_log("browser")
    browser.get((served.root / PAGE).as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def narrow(page: webdriver.Chrome, width: int) -> None:
    sizes = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def widths(page: webdriver.Chrome) -> list[float]:
    """Of the drawn figures."""
    script = "return [...document.querySelectorAll('.plot .main-svg')].map(e => e.getBoundingClientRect().width)"
    return list(page.execute_script(script))


def test_it_asks_the_network_for_nothing_and_says_no_error(page: webdriver.Chrome) -> None:
    events = [json.loads(row["message"])["message"] for row in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [page.current_url]
    assert page.get_log("browser") == []


def test_every_figure_is_drawn(page: webdriver.Chrome) -> None:
    plots = page.find_elements(By.CSS_SELECTOR, ".plot")
    assert len(plots) > 10
    for plot in plots:
        assert plot.find_elements(By.CSS_SELECTOR, ".main-svg .trace"), plot.get_attribute("aria-label")
    # The policies: a bar for each of two layers and two policies.
    assert len(page.find_elements(By.CSS_SELECTOR, "#policy-2 .bars .point")) == 2 * 2


def test_a_phone_scrolls_down_only(page: webdriver.Chrome, screenshot: Callable[[str], None]) -> None:
    screenshot("report")
    narrow(page, 390)
    page.refresh()
    screenshot("report-phone")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert page.execute_script(TOO_WIDE) == []
    assert max(widths(page)) <= 390


def test_figures_follow_the_width_of_the_window(page: webdriver.Chrome) -> None:
    before = max(widths(page))
    narrow(page, 600)
    page.execute_async_script("setTimeout(arguments[0], 1000)")  # plotly waits for a pause in the changes
    assert max(widths(page)) <= 600 < before


def test_paper_has_all_of_it(page: webdriver.Chrome) -> None:
    before = widths(page)
    narrow(page, 685)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.execute_script(TOO_WIDE) == []
    assert page.find_element(By.CSS_SELECTOR, "pre.parameters").is_displayed()
    assert not page.find_element(By.TAG_NAME, "nav").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not page.find_element(By.CSS_SELECTOR, "pre.parameters").is_displayed()
    assert widths(page) == before
    pdf = base64.b64decode(page.print_page())
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") > 4
