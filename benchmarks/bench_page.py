"""How long a browser takes over the page of a comparison of 200 runs (made up: ten methods, four tasks, five seeds).

    python benchmarks/bench_page.py

Needs Chromium with its driver. Times are from the request of the page until it can be read and scrolled, and until
the last figure is drawn, in turns with a page that is empty.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver

from rankwise.comparing.report import render_comparison
from rankwise.comparing.statistics import spread as interval
from timing import interleaved, machine, spread

METHODS, TASKS, SEEDS, RATES, LAYERS = 10, 4, 5, 4, 7
PLACES = ("relative", "effective_rank", "top", "middle", "bottom", "chance", "amplification", "intruders")


def made_up() -> dict[str, Any]:
    """What ``summary.json`` would hold."""
    generator = random.Random(0)
    tasks, methods = ([f"{kind} {number}" for number in range(count)] for kind, count in (("task", 4), ("method", 10)))
    texts = ["reviews", "articles"]
    rows = []
    for task in tasks:
        for method in methods:
            values = {seed: generator.uniform(2, 3) for seed in range(SEEDS)}
            row: dict[str, Any] = {
                "task": task,
                "method": method,
                "title": method,
                "paper": "",
                "rank": 16,
                "budget": None,
                "undecided": None,
                "cases": 500,
            }
            row |= {"learning_rate": 1e-3, "metric": "loss", "values": values, **interval([*values.values()])._asdict()}
            row |= dict.fromkeys(("difference", "difference_low", "difference_high", "p", "p_holm"), 0.1)
            row |= {"parameters": generator.randint(10**4, 10**6), "parameters_left": None, "step_seconds": 0.5}
            row |= {"peak_memory": 2**30, "failed": None, "updates": {"modules": 42, "rank": 16}}
            row["metrics"] = {"loss": row["mean"], **{f"{text} loss": generator.uniform(4, 5) for text in texts}}
            row["updates"] |= {name: generator.uniform(0.01, 1) for name in PLACES}
            row["drift"] = {text: {str(at): generator.uniform(0.5, 1) for at in range(LAYERS)} for text in texts}
            row["curve"] = [[10 * step, 3 + generator.uniform(0, 1) / step] for step in range(1, 51)]
            row["ranks"] = {f"layer {at}": generator.randint(1, 100) for at in range(LAYERS)}
            row["training"] = {"loss": row["mean"] - generator.uniform(0, 0.5)}
            rows.append(row)
    tried = {"rank": None, "budget": None, "seed": 0, "share": 0.25, "value": 2.5}
    search = [
        {"task": task, "method": method, "learning_rate": 10.0**-rate, **tried}
        for task in tasks
        for method in methods
        for rate in range(1, RATES + 1)
    ]
    base = {task: {"loss": 5.0, **{f"{text} loss": 4.0 for text in texts}} for task in tasks}
    about = {"name": "a page", "against": methods[0], "seeds": list(range(SEEDS)), "comparison": {}, "versions": {}}
    return {**about, "rows": rows, "runs": METHODS * TASKS * SEEDS, "search": search, "base": base}


def main() -> None:
    """Print times and the page's size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="(%(default)s)")
    runs = parser.parse_args().runs
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(word)
    page = render_comparison(made_up())
    figures = page.count('class="plot"')
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with tempfile.TemporaryDirectory() as folder:
            full, empty = Path(folder) / "page.html", Path(folder) / "empty.html"
            full.write_text(page, encoding="utf-8")
            empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")

            def shown(file: Path, wanted: int = 0) -> float:
                started = time.perf_counter()
                driver.get(file.as_uri())
                drawn = "return document.querySelectorAll('.plot > .plot-container').length"
                while driver.execute_script(drawn) < wanted:
                    time.sleep(0.02)
                return time.perf_counter() - started

            ways = {
                "until it can be read": lambda: shown(full),
                "until the last figure": lambda: shown(full, figures),
                "an empty page": lambda: shown(empty),
            }
            found = interleaved(ways, runs)
    finally:
        driver.quit()
    print(machine(1))
    print(f"{METHODS * TASKS * SEEDS} runs, {figures} figures, {len(page.encode()) / 1e6:.1f} MB")
    for name, values in found.items():
        print(f"{name}: {spread(values)}")


if __name__ == "__main__":
    main()
