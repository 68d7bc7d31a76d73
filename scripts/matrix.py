"""Run tests with the oldest and the newest supported peft, transformers and trl, each in an environment of its own.

    make matrix                                   # oldest and newest, with this Python
    make matrix ARGS="--pythons python3.12 python3.13"   # the newest with others, too

The oldest are the lower bounds in pyproject.toml, the newest what the package index has within the upper ones; all else
is what pip chooses beside them. An environment lies in `.venv/matrix/NAME`, and is made anew where it asks for other
versions. The tests are those that meet these libraries; `--tests tests` runs all. Exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv" / "matrix"
MATCHED = ("peft", "transformers", "trl")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "beartype", "psutil")
TESTS = (
    "adalora_callback adapters allocation_callback checkpoints exporting gate_steps gates_resumed methods method_runs "
    "milora milora_checkpoint milora_families milora_trainers peft_bridge preference_trainer preference_training "
    "processes pruning restoring run sora trees_exactness"
).split()


def oldest() -> list[str]:
    """The lower bounds, as exact versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    bounds = {one.name: one.specifier for one in wanted if one.name in MATCHED}
    lowest = {name: next(one.version for one in bound if one.operator == ">=") for name, bound in bounds.items()}
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


def installed(python: str, name: str, versions: list[str], torch: str) -> Path:
    """The Python of an environment with these versions, made where it is not there."""
    wanted = [f"{ROOT}[maths,sequences]", *TOOLS, *versions]
    folder, asked = HOME / name, "\n".join([python, torch, *wanted])
    stamp, own = folder / "asked.txt", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == asked:
        return own
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *torch.split()], check=True)
    subprocess.run([*pip, "--editable", *wanted], check=True)
    stamp.write_text(asked, encoding="utf-8")
    return own


def versions_of(python: Path) -> list[str]:
    """What an environment has: Python, and the three libraries."""
    code = (
        "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], *map(v, sys.argv[1:]))"
    )
    found = subprocess.run([python, "-c", code, *MATCHED], check=True, capture_output=True, text=True)
    return found.stdout.split()


def main() -> int:
    """Install, run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="*", default=[], help="other Pythons, with the newest versions")
    parser.add_argument("--only", nargs="*", help="names of environments: oldest, newest, or of other Pythons")
    parser.add_argument("--tests", nargs="*", default=[f"tests/test_{name}.py" for name in TESTS])
    parser.add_argument("--torch", default="torch==2.13.0", help="what follows `pip install`")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    newest = list(MATCHED)
    wanted = {"oldest": (sys.executable, oldest()), "newest": (sys.executable, newest)}
    wanted |= {Path(python).name: (python, newest) for python in asked.pythons}
    table = Table("environment", "Python", *MATCHED, "tests")
    failed = False
    for name, (python, versions) in wanted.items():
        if asked.only and name not in asked.only:
            continue
        own = installed(python, name, versions, asked.torch)
        command = [own, "-m", "pytest", "-q", "-n", str(asked.workers), "-W", "ignore", *asked.tests]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False, text=True, stdout=subprocess.PIPE
        )
        print(done.stdout[-6000:] if done.returncode else done.stdout[-200:])
        failed |= done.returncode != 0
        table.add_row(name, *versions_of(own), done.stdout.strip().splitlines()[-1])
    Console(width=140).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
