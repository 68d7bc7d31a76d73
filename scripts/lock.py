"""Write requirements.lock: the exact version of every package that rankwise needs, as installed here, with its hashes.

    .venv/bin/python scripts/lock.py

The packages are those that pyproject.toml asks for, with the ``dev`` and ``bench`` extras, and all that they
need in turn. torch is left out, as the Makefile installs the build that fits the machine. The ``weights``
group is recorded without its dependencies. To move to newer versions, install them first.

The hashes are of all files of a version, for any platform, as the package index that pip is configured for has them
(its JSON form, PEP 691): with them pip takes no other file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version
from pip._internal.commands import create_command

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "bench")
JSON_PAGE = "application/vnd.pypi.simple.v1+json"
LEFT_OUT = {"torch", "rankwise", "pip"}
HEADER = """\
# Exact versions for the environment that the Makefile makes; written by `make lock`, not by hand.
# Installed with --no-deps, after torch: the list is complete. pip refuses files of other hashes.
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


def hashes(pins: dict[str, str]) -> dict[str, list[str]]:
    """The SHA-256 of each file of each pinned version, as pip's option."""
    command = create_command("download")  # pip itself knows which index is configured, and how it is reached
    options, _ = command.parse_args([])
    found = {}
    with command._build_session(options) as session:
        for name, version in pins.items():
            page = session.get(
                f"{options.index_url}/{name}/", headers={"accept": "application/vnd.pypi.simple.v1+json"}
            )
            page.raise_for_status()
            files = [file for file in page.json()["files"] if version_of(file["filename"]) == Version(version)]
            found[name] = sorted(f"--hash=sha256:{file['hashes']['sha256']}" for file in files)
            if not files:
                raise SystemExit(f"{name}=={version} is not in the package index: install a version that is")
    return found


def version_of(file: str) -> Version | None:
    """The version in a file's name; None for what pip does not install."""
    try:
        return (parse_wheel_filename if file.endswith(".whl") else parse_sdist_filename)(file)[1]
    except ValueError:
        return None


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
    known = hashes(pins)
    entries = (" \\\n    ".join([f"{name}=={pins[name]}", *known[name]]) for name in sorted(pins))
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(entries) + "\n", encoding="utf-8")
    print(f"requirements.lock: {len(pins)} packages, {sum(map(len, known.values()))} hashes")


if __name__ == "__main__":
    main()
