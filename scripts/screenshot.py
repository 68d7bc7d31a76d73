"""Take a picture of a run's report with headless Chromium.

Example:
    python scripts/screenshot.py runs/demo/report.html docs/report.png --height 2600
    python scripts/screenshot.py runs/thresholds/report.html ranks.png --only Ranks --height 500
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, picture: Path, width: int, height: int, dark: bool, chromium: str) -> None:
    """Write ``picture``, a PNG of the top ``height`` pixels of ``page`` at a window ``width`` pixels wide."""
    with tempfile.TemporaryDirectory() as profile:
        target = Path(profile) / "picture.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [
            chromium,
            *QUIET,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            scheme,
            "--virtual-time-budget=10000",
            f"--screenshot={target}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not target.is_file():
            raise RuntimeError(f"Chromium wrote no picture (exit {done.returncode}): {done.stderr.strip()[-500:]}")
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(target, picture)


def only_sections(page: str, titles: list[str]) -> str:
    """The page without its header and without the sections of other titles."""
    page = re.sub(r"<header.*?</header>", "", page, flags=re.DOTALL)
    kept = "|".join(map(re.escape, titles))
    return re.sub(rf"<section[^>]*>\s*<h2[^>]*>(?!(?:{kept})</h2>).*?</section>", "", page, flags=re.DOTALL)


def main() -> int:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/report.png"), help="PNG to write")
    parser.add_argument("--width", type=int, default=1280, help="window width in pixels")
    parser.add_argument("--height", type=int, default=1600, help="window height in pixels")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="sections to show, by their headings (all)")
    parser.add_argument("--dark", action="store_true", help="as a reader with a dark colour scheme sees it")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None or not options.page.is_file():
        missing = (
            "no chromium is installed"
            if chromium is None
            else f"{options.page} is not there, write it with `rankwise report`"
        )
        print(f"screenshot: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        page = options.page
        if options.only:
            page = Path(folder) / "page.html"
            page.write_text(only_sections(options.page.read_text(encoding="utf-8"), options.only), encoding="utf-8")
        screenshot(page, options.picture, options.width, options.height, options.dark, chromium)
    print(options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
