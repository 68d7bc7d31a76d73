from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise

PACKAGE = Path(rankwise.__file__).parent
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "plotly", "sklearn", "scipy"}


def module_name(path: Path) -> str:
    parts = ("rankwise", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__name__ == name
    assert (module.__doc__ or "").strip()


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", rankwise.__all__)
def test_public_name_resolves_to_the_package_itself(name: str) -> None:
    value = getattr(rankwise, name)
    assert value.__name__ == name
    assert value.__module__.startswith("rankwise.")
    assert value.__doc__
    assert name in dir(rankwise)


def test_public_names_are_listed_once_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(rankwise.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    typed = sorted(
        alias.name for node in imports if node.module != "__future__" for alias in node.names if node.module != "typing"
    )
    assert typed == sorted(rankwise.__all__)
    assert len(set(rankwise.__all__)) == len(rankwise.__all__)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        rankwise.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", ["rankwise", "rankwise.cli", "rankwise.recommend"])
def test_importing_stays_light(module: str) -> None:
    loaded = fresh_python(f"import sys, {module}; print(*(name for name in sys.modules if '.' not in name))")
    assert HEAVY & set(loaded.split()) == set()


def test_public_names_work_in_a_fresh_interpreter() -> None:
    code = "import rankwise; print(*(getattr(rankwise, name).__name__ for name in rankwise.__all__))"
    assert fresh_python(code).split() == rankwise.__all__


def test_export_stays_a_function_after_its_module_is_imported() -> None:
    assert fresh_python("import rankwise.exporting, rankwise; print(callable(rankwise.export))").strip() == "True"
