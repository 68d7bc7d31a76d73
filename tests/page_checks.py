"""What any page must be: well-formed, accessible, and drawn in a browser without an error, on a phone as well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
NEEDS_DRIVER = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver is installed")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
WIDTHS = """<script>addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter((one) => {
    const inside = one.closest(".scroll, pre, svg, details:not([open])");
    return !inside && one.getBoundingClientRect().right > innerWidth + 1;
  });
  document.body.dataset.wide = wide.map((one) => one.tagName + "." + one.className).join(" ");
  document.body.dataset.widths = innerWidth + " " + document.documentElement.scrollWidth;
}, 3000))</script>"""


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts, and whether tags are balanced."""

    VOID = frozenset(("meta", "link", "img", "br", "input"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.text, self.figures = "", dict[str, Any]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("type") == "application/json":
            self.figures[attributes["data-figure"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += data

    def having(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_in(path: Path) -> Page:
    """A page whose tags are balanced."""
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def check_accessible(page: Page) -> None:
    """One heading and main part, a caption for each table, words for each figure, and ids that are there once."""
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == names.count("main") == 1
    assert names.count("caption") == names.count("table")
    assert page.having("html") == [{"lang": "en"}]
    plots = [one for one in page.having("div") if one.get("class") == "plot"]
    assert all(one["role"] == "img" and one["aria-label"] for one in plots)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {one["aria-labelledby"] for one in page.having("section")} <= set(ids)


def drawn(page: Path, profile: Path, width: int = 1280, script: str = "") -> str:
    """The page as Chromium has it once its scripts have run; nothing went wrong meanwhile."""
    copy = profile.with_suffix(".html")
    html = page.read_text(encoding="utf-8")
    copy.write_text(html.replace("</body>", f"{script}</body>"), encoding="utf-8")
    words = [f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, *words, copy.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def check_on_a_phone(page: Path, profile: Path) -> None:
    """No wider than the narrowest window that the browser has; what is wider scrolls in its own frame."""
    found = drawn(page, profile, 390, WIDTHS)
    widths = re.search(r'data-widths="(\d+) (\d+)"', found)
    assert widths is not None
    window, content = map(int, widths.groups())
    wide = re.search(r'data-wide="([^"]*)"', found)
    assert window <= 500
    assert content <= window, f"{content} pixels in {window}: {wide and wide[1]}"
    assert wide is not None and not wide[1], wide[1]
