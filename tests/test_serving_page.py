"""The page in a browser: picked by keyboard and mouse, two stages compared, titles never more than text."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

import serving_runs
from page_checks import CHROMIUM, DRIVER, NEEDS_DRIVER
from rankwise.recommend.recommender import Ranking, Recommendation
from rankwise.serving.app import create_app
from rankwise.serving.settings import ServerSettings
from rankwise.serving.stages import Stages, load_stages
from serving_runs import EVIL

pytestmark = NEEDS_DRIVER
TOKEN = "a-token-of-26-letters-long"


@contextlib.contextmanager
def served(stages: Stages, **settings: Any) -> Iterator[str]:
    """The address of the application, served by a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on a browser waits for the server instead of being refused
        app = create_app(stages, ServerSettings(**settings), "small <run>")
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=60)


@pytest.fixture(scope="module")
def stages(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return load_stages(serving_runs.small_run(tmp_path_factory.mktemp("served"), model_folder))


@pytest.fixture(scope="module")
def address(stages: Stages) -> Iterator[str]:
    with served(stages) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    words = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"]
    words += ["no-first-run", "disable-sync", "disable-component-update", "window-size=1100,900"]
    for word in [*words, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{word}")
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self.wait = WebDriverWait(browser, 30)

    def part(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        return list(self.browser.execute_script(script, selector))

    def until(self, holds: Any) -> None:
        self.wait.until(lambda _: holds())

    def settled(self, count: int) -> None:
        """Wait until both rankings have been drawn after so many titles were chosen."""
        self.until(lambda: len(self.texts("#chosen li")) == count and "moved" in self.part("status").text)
        assert not self.part("results").get_attribute("aria-busy")

    def type(self, *keys: str) -> None:
        self.part("query").send_keys(*keys)

    def add(self, words: str) -> None:
        """Type a part of a title and take the first that fits."""
        before = len(self.texts("#chosen li"))
        self.type(words)
        self.until(lambda: self.part("query").get_attribute("aria-activedescendant") == "option-0")
        self.type(Keys.ENTER)
        self.settled(before + 1)

    def ranking(self, side: str) -> list[str]:
        return self.texts(f"#{side}-list .title")

    def moves(self, side: str) -> list[str]:
        return self.texts(f"#{side}-list .move > [aria-hidden]")


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    browser.get_log("browser")
    made = Page(browser)
    browser.get(address)
    made.until(lambda: made.texts("#popular button"))
    yield made
    assert [line for line in browser.get_log("browser") if "status of 4" not in line["message"]] == []


def expected(stages: Stages, stage: str, history: list[str], top: int = 10) -> list[str]:
    with stages.use(stage) as recommender:
        [ranking] = recommender.recommend([history], top)
    return [one.title for one in ranking.best]


def marks(before: list[str], after: list[str]) -> list[str]:
    """The marks of the right-hand ranking."""

    def mark(place: int, title: str) -> str:
        if title not in before:
            return "new"
        steps = before.index(title) - place
        return "=" if steps == 0 else f"{'▲' if steps > 0 else '▼'} {abs(steps)}"

    return [mark(place, title) for place, title in enumerate(after)]


def test_titles_are_picked_with_the_keyboard_alone(page: Page, stages: Stages) -> None:
    query = page.part("query")
    assert query.get_attribute("aria-expanded") == "false"
    page.type("the")
    page.until(lambda: query.get_attribute("aria-expanded") == "true" and len(page.texts("#options [role=option]")) > 2)
    shown = page.texts("#options [role=option]")
    assert page.texts("#options [aria-selected=true]") == [shown[0]]
    page.type(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert query.get_attribute("aria-activedescendant") == "option-1"
    assert page.texts("#options [aria-selected=true]") == [shown[1]]
    page.type(Keys.ENTER)
    page.settled(1)
    assert page.texts("#chosen li span") == [shown[1]]
    assert query.get_attribute("value") == "" and not page.part("options").is_displayed()
    page.type("cur")
    page.until(lambda: page.part("options").is_displayed())
    page.type(Keys.ESCAPE)
    assert not page.part("options").is_displayed() and query.get_attribute("value") == "cur"
    page.type(Keys.ESCAPE)
    assert query.get_attribute("value") == ""
    page.type(Keys.BACKSPACE)
    page.until(lambda: page.part("empty").is_displayed())
    assert not page.part("results").is_displayed()


def test_fast_typing_takes_what_fits_all_of_it(page: Page) -> None:
    page.type("Curse of the Z", Keys.ENTER)
    page.settled(1)
    assert page.texts("#chosen li span") == ["Curse of the Zombie"]


def test_two_stages_are_compared_and_what_moved_is_marked(page: Page, stages: Stages) -> None:
    page.add("Curse of the Zombie")
    page.add("The Dusty Canyon")
    history = page.texts("#chosen li span")
    assert (Select(page.part("before")).first_selected_option.text, page.part("after").get_attribute("value")) == (
        "sft",
        "softmax-DPO",
    )
    for before, after in (("sft", "softmax-DPO"), ("base model", "softmax-DPO"), ("base model", "base model")):
        page.browser.execute_script("document.getElementById('status').textContent = ''")
        for side, stage in (("before", before), ("after", after)):
            Select(page.part(side)).select_by_value(stage)
        page.browser.execute_script("document.getElementById('after').dispatchEvent(new Event('change'))")
        page.settled(2)
        left, right = (expected(stages, stage, history) for stage in (before, after))
        assert (page.ranking("before"), page.ranking("after")) == (left, right)
        assert page.moves("after") == marks(left, right)
        assert page.moves("before") == ["out" for title in left if title not in right]
        fresh = len(set(right) - set(left))
        assert f"{fresh} new" in page.part("status").text


def test_the_mouse_and_the_options(page: Page, stages: Stages) -> None:
    page.browser.find_element(By.CSS_SELECTOR, "#popular button").click()
    page.settled(1)
    page.part("query").click()
    page.until(lambda: page.part("options").is_displayed())
    page.browser.find_element(By.ID, "option-2").click()
    page.settled(2)
    first, second = page.texts("#chosen li span")
    Select(page.part("top")).select_by_visible_text("5")
    page.until(lambda: len(page.ranking("after")) == 5)
    page.settled(2)
    assert page.ranking("after") == expected(stages, "softmax-DPO", [first, second], 5)
    page.browser.find_element(By.CSS_SELECTOR, f'[aria-label="Remove {first}"]').click()
    page.settled(1)
    assert page.texts("#chosen li span") == [second]
    page.part("clear").click()
    page.until(lambda: page.part("empty").is_displayed())


@pytest.mark.parametrize("title", EVIL)
def test_titles_are_only_ever_text(page: Page, stages: Stages, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def recommend(histories: Any, *_: Any, **__: Any) -> list[Ranking]:
        return [Ranking([Recommendation(title, -1.0, [title]) for title in EVIL], True, 1) for _ in histories]

    monkeypatch.setattr(stages.recommender, "recommend", recommend)
    page.add(title[:8])
    assert page.texts("#chosen li span") == [title]
    assert page.ranking("before") == page.ranking("after") == EVIL
    assert page.browser.title == "What next? · rankwise"
    assert page.browser.find_elements(By.CSS_SELECTOR, "main img, main script") == []
    assert page.part("run").text == "rankwise · small <run>"


def test_what_fits_nothing_and_what_fails_is_said(page: Page) -> None:
    page.type("no such title")
    page.until(lambda: page.texts("#options li") == ["No title fits."])
    page.type(Keys.ENTER)
    assert page.texts("#chosen li") == []
    page.type(Keys.ESCAPE, Keys.ESCAPE)
    page.browser.execute_script("window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.browser.find_element(By.CSS_SELECTOR, "#popular button").click()
    page.until(lambda: "cannot be reached" in page.part("problem").text)
    assert page.part("problem").get_attribute("role") == "alert"
    assert not page.part("results").is_displayed()


@pytest.mark.parametrize("width", [340, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_colours_contrast(page: Page, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.add("<img")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    lists = [page.part(f"{side}-list").rect for side in ("before", "after")]
    assert (lists[0]["y"] == lists[1]["y"]) == (width == 1100)
    assert page.browser.execute_script(CONTRASTS) >= 4.5
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# The least contrast, as WCAG has it, of texts with the first opaque background behind them.
CONTRASTS = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (part) => {
  for (; part; part = part.parentElement) {
    const colour = parse(getComputedStyle(part).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
};
const contrast = (part) => {
  const both = [light(parse(getComputedStyle(part).color)), light(behind(part))].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
};
const texts = [...document.querySelectorAll("h1, h2, p, label, button, select, .title, .share, .rank, .move, a")];
return Math.min(...texts.filter((part) => part.offsetParent && part.textContent.trim()).map(contrast));
"""


def test_a_token_is_asked_for_and_kept(browser: webdriver.Chrome, stages: Stages) -> None:
    page = Page(browser)
    with served(stages, token=TOKEN) as address:
        browser.get(address)
        page.until(lambda: page.part("token-form").is_displayed())
        page.part("token").send_keys("a wrong token", Keys.ENTER)
        page.until(lambda: page.part("token").get_attribute("value") == "" and page.part("problem").is_displayed())
        page.part("token").send_keys(TOKEN, Keys.ENTER)
        page.until(lambda: page.texts("#popular button") and not page.part("token-form").is_displayed())
        browser.refresh()
        page.until(lambda: page.texts("#popular button"))
        assert not page.part("token-form").is_displayed()
        page.add("Curse of the Zombie")


def test_the_interface_is_shown(browser: webdriver.Chrome, address: str) -> None:
    browser.get_log("browser")
    page = Page(browser)
    browser.get(f"{address}docs")
    page.until(lambda: len(page.texts("main h2")) > 8)
    assert {"POST /recommend", "GET /titles", "GET /stages", "GET /health", "GET /metrics"} <= set(
        page.texts("main h2")
    )
    assert "exclude_seen" in page.texts("main td") and browser.get_log("browser") == []
