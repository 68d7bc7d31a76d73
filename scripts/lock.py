"""Write requirements.lock: the exact version of every package that rankwise needs, as installed here.

    .venv/bin/python scripts/lock.py

The packages are those that pyproject.toml asks for, with the ``dev`` and ``bench`` extras, and all that they
need in turn. torch is left out, as the Makefile installs the build that fits the machine. The ``weights``
group is recorded without its dependencies. To move to newer versions, install them first.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "bench")
LEFT_OUT = {"torch", "rankwise", "pip"}
HEADER = """\
# Exact versions for the environment that the Makefile makes; written by `make lock`, not by hand.
# Installed with --no-deps, after torch: the list is complete.
"""


def needed(requirements: Iterable[Requirement], pins: dict[str, str]) -> None:
    """Add the installed version of each requirement and of all that it needs in turn to ``pins``."""
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        found = distribution(name)
        seen = name in pins
        pins[name] = found.version
        if not seen or requirement.extras:
            needed(applying(found.requires or [], requirement.extras), pins)


def applying(lines: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Those requirements that hold on this platform with these ``extras``."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if not one.marker or any(one.marker.evaluate(env) for env in environments)]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = list(project["project"]["dependencies"])
    for extra in EXTRAS:
        wanted += project["project"]["optional-dependencies"][extra]
    pins: dict[str, str] = {}
    needed(applying(wanted), pins)
    needed(applying(distribution("torch").requires or []), pins)
    for line in project["dependency-groups"]["weights"]:
        name = canonicalize_name(Requirement(line).name)
        pins[name] = distribution(name).version
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins)]
    (ROOT / "requirements.lock").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"requirements.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
