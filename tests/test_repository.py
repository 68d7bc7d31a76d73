from __future__ import annotations

import importlib.resources
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rankwise
from rankwise.comparing.cells import make_cell, settings
from rankwise.comparing.choosing import deciding_metric
from rankwise.recipes import load_comparison, load_recipe
from rankwise.schema import GlueData
from rankwise.tasks.glue import TASKS as GLUE_TASKS

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("src", "scripts", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# No god files


@pytest.mark.parametrize("path", python_files(*CODE_FOLDERS, "tests"), ids=relative)
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


# Shapes


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="policy_rejected"):
        rankwise.softmax_dpo_loss(*(torch.zeros(shape) for shape in [2, (3, 1), 2, (2, 1)]), 1.0)


# Pages


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [first or second for first, second in LINK.findall(text)]
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_changelog_ends_at_the_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", rankwise.__version__]


# Packaging


def test_models_and_templates_are_package_data() -> None:
    package = importlib.resources.files("rankwise")
    assert (package / "py.typed").is_file()
    assert (package / "models" / "reviews" / "model.safetensors").is_file()
    assert [entry for entry in (package / "recommend" / "templates").iterdir() if entry.name.endswith(".yaml")]


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"rankwise-{rankwise.__version__}-")
    package = ROOT / "src" / "rankwise"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("rankwise/")}
    assert inside == {f"rankwise/{path.relative_to(package).as_posix()}" for path in files}


# Exact versions

PIN = r"^(?:TORCH \?= )?([a-z0-9-]+)==([0-9][0-9a-z.]*)"
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_every_pin_has_hashes_and_pip_asks_for_them() -> None:
    entries = re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE)
    assert re.fullmatch(rf"(?:{PIN}(?: \\\n    --hash=sha256:[0-9a-f]{{64}})+\n)+", entries, flags=re.MULTILINE)
    assert "--no-deps --require-hashes -r requirements.lock" in (ROOT / "Makefile").read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    return dict(re.findall(PIN, LOCK + (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_every_requirement_is_pinned_within_its_range() -> None:
    asked = list(PROJECT["project"]["dependencies"]) + list(PROJECT["dependency-groups"]["weights"])
    for extra in ("dev", "bench"):
        asked += PROJECT["project"]["optional-dependencies"][extra]
    versions = pins()
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_page_of_recipes_is_what_the_schema_says() -> None:
    script = ROOT / "scripts" / "recipe_reference.py"
    found = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert found.returncode == 0, "run python scripts/recipe_reference.py"


FOR_ACCELERATE = ROOT / "examples" / "processes" / "ddp.yaml"
EXAMPLES = sorted({*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")} - {FOR_ACCELERATE})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_DATA", "data")
    if "methods:" in example.read_text(encoding="utf-8"):
        comparison = load_comparison(example)
        for task, entry in itertools.product(comparison.tasks, comparison.methods):
            for part in ("search", "final"):
                recipe = make_cell(comparison, task, entry, settings(comparison, entry)[0], 0, 1.0, part).recipe
                assert recipe.stages
                if isinstance(recipe.data, GlueData):
                    assert deciding_metric(comparison, task, GLUE_TASKS[recipe.data.task].metrics)
        return
    assert load_recipe(example).stages
