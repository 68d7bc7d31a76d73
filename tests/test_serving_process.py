"""`rankwise serve` as a process: it stops without losing an answer; and its page in a browser, clicked through."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest

import small_runs
from rankwise.cli import main
from rankwise.run import Run

CHROMIUM, DRIVER = which("chromium") or which("chromium-browser"), which("chromedriver")
EVIL = ["<script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run of two stages on a log of which two titles are markup."""
    folder = tmp_path_factory.mktemp("served")
    stages = [small_runs.SFT, small_runs.DPO]
    recipe = small_runs.recipe("interactions", folder, model_folder, stages=stages, evaluation={"cases": 5})
    items = Path(recipe.data.items)  # type: ignore[union-attr, arg-type]
    lines = items.read_text(encoding="utf-8").splitlines()
    for at, title in enumerate(EVIL, start=1):
        identifier = lines[at].split(",")[0]
        quoted = title.replace('"', '""')
        lines[at] = f'{identifier},"{quoted}"' + "," * (lines[0].count(",") - 1)
    items.write_text("\n".join(lines), encoding="utf-8")
    run = Run(recipe, small_runs.silent())
    run()
    return run.folder


@pytest.fixture
def server(run_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address."""
    command = [sys.executable, "-m", "rankwise.cli", "serve", str(run_folder), "--port", "0", "--timeout", "20"]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving: "):
                yield process, line.split()[1]
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}")
        process.terminate()
        assert process.wait(30) == 0


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/recommend", json=body, timeout=30)


def test_a_stopped_server_answers_what_is_in_flight(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert post(url, user="u1").status_code == 200
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(post, url, user=f"u{at}", top=50) for at in range(1, 17)]
        text = ""
        while "rankwise_batch_size_count 2.0" not in text and not all(one.done() for one in asked):
            text = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        codes = [one.result().status_code if one.exception() is None else None for one in asked]
    assert set(codes) <= {200, None} and 200 in codes  # None: it had not been taken when the server stopped listening
    assert process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        post(url, user="u1")


def test_an_address_in_use(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run_folder), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium or its driver is not installed")
def test_a_person_clicks_through_the_page(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    known = httpx.get(f"{server[1]}/stages").json()["titles"]
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER))) as browser:
        wait = WebDriverWait(browser, 60)

        def texts(selector: str) -> list[str]:
            return [one.text for one in browser.find_elements(By.CSS_SELECTOR, selector)]

        def type_in(text: str) -> None:
            browser.find_element(By.ID, "search").send_keys(text)
            wait.until(lambda _: texts("#options li"))

        browser.get(server[1])
        wait.until(lambda _: len(texts("#stage-0 option")) == 2)
        type_in("<script>")
        assert texts("#options li") == EVIL[:1]
        browser.find_element(By.ID, "search").send_keys(Keys.ENTER)
        wait.until(lambda _: len(texts("#ranking-1 li")) == min(10, known - 1))
        type_in("<img")
        browser.find_element(By.CSS_SELECTOR, "#options li").click()
        wait.until(lambda _: "2 titles" in browser.find_element(By.ID, "status").text)
        assert [text.rstrip("\u00d7").strip() for text in texts("#history li")] == EVIL
        assert len(texts("#ranking-0 li")) == len(texts("#ranking-1 li")) == min(10, known - 2)
        before, after = texts("#ranking-0 .title"), texts("#ranking-1 .title")
        expected = post(server[1], history=EVIL, stages=texts("#stage-0 option")).json()["rankings"]
        assert [one["title"] for one in expected[0]["recommendations"]] == before
        assert [one["title"] for one in expected[1]["recommendations"]] == after
        type_in("no such title")
        assert texts("#options li") == ["No title has these letters."]
        browser.find_element(By.ID, "search").send_keys(Keys.ESCAPE)
        browser.find_element(By.CSS_SELECTOR, "#history button").click()
        wait.until(lambda _: "1 title." in browser.find_element(By.ID, "status").text)
        browser.find_element(By.ID, "clear").click()
        assert not texts("#history li") and not texts("#ranking-0 li")
        assert browser.title.startswith("What next?")  # no title has run
        browser.get(f"{server[1]}/docs")
        wait.until(lambda _: "POST /recommend" in texts("#paths dt"))
        assert browser.get_log("browser") == []
