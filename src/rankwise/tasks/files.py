"""The files that a recipe reads: whether they are there, and whether they are still what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rankwise.errors import UserError, naming
from rankwise.files import file_digest
from rankwise.models import EMBEDDED_FOLDER, resolve
from rankwise.recommend.logs.known import known_log
from rankwise.schema import ChoiceData, GlueData, InteractionData, MathsData, Recipe
from rankwise.tasks.glue import glue_files

BLOCK, BLOCKS = 2**18, 256  # bytes that are read in one place of a large file of weights, and how many places
WEIGHTS = ".safetensors"
KEYS = ("interactions", "items", "train", "validation", "test", "names")


class DataChanged(UserError):
    """A file that a run reads is not what it was when the run began."""


def check_recipe_files(recipe: Recipe) -> None:
    """Raise a ``UserError`` for the first file of a recipe that is missing."""
    for name, text in recipe.evaluation.texts.items():
        if not Path(text).is_file():
            raise UserError(f"evaluation.texts.{name} {text} does not exist: give a file's path")
    for name, data in recipe.evaluation.tasks.items():
        with naming(f"evaluation.tasks.{name}"):
            check_files(data)
    check_files(recipe.data)


def check_files(data: object) -> None:
    """Raise a ``UserError`` for the first file of a data section that is missing."""
    for name, path in _files(data):
        folder = name in ("interactions", "items") or isinstance(data, MathsData | ChoiceData)
        if not (path.exists() if folder else path.is_file()):
            raise UserError(f"data.{name} {path} does not exist: give a file's path, from the folder you are in")
    if isinstance(data, InteractionData) and data.form is not None:
        known_log(data.form, Path(data.interactions))


def _files(data: object) -> Iterator[tuple[str, Path]]:
    """The files and folders of a data section, by its keys; none of what is on the hub."""
    for name in KEYS:
        if (path := getattr(data, name, None)) is not None:
            yield name, Path(path)
    for name, path in getattr(data, "others", {}).items():
        yield f"others.{name}", Path(path)
    if isinstance(data, GlueData) and data.folder is not None:
        for file in glue_files(data.task, Path(data.folder)):
            yield f"folder ({file.name})", file


def data_digests(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of each file that a recipe reads, by its key; of a folder, over the names and contents in it.

    Of weights of more than 64 MiB it is that of the size and of 256 places, from the first to the last byte.
    """
    found = [(f"data.{name}", path) for name, path in _files(recipe.data)]
    if (template := getattr(recipe.data, "template", None)) and Path(template).is_file():
        found.append(("data.template", Path(template)))
    found += [(f"model.path ({file.name})", file) for file in _base_files(Path(resolve(recipe.model.path)))]
    for name, data in recipe.evaluation.tasks.items():
        found += [(f"evaluation.tasks.{name}.{key}", path) for key, path in _files(data)]
    found += [(f"evaluation.texts.{name}", Path(path)) for name, path in recipe.evaluation.texts.items()]
    return {name: _digest(path, Path(recipe.output).resolve()) for name, path in found}


def _digest(path: Path, output: Path) -> str:
    """Of a file, or of a folder without the run's own, which may lie in it."""
    if path.suffix == WEIGHTS and path.stat().st_size > BLOCK * BLOCKS:
        return _digest_of_places(path)
    if not path.is_dir():
        return file_digest(path)
    found = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file() and output not in one.resolve().parents):
        found.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return found.hexdigest()


def _digest_of_places(path: Path) -> str:
    """Of a file's size and of blocks that lie evenly in it: hashing all of a large model would take minutes."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def _base_files(folder: Path) -> Iterator[Path]:
    """What a base is loaded from, where it is a folder; what is shipped has the version of rankwise."""
    if folder.is_dir() and folder != EMBEDDED_FOLDER:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja", WEIGHTS):
                yield file


def check_same_data(earlier: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose data are not those that it began with.

    Raises:
        DataChanged: a file is another one.
    """
    for name, digest in now.items():
        if earlier.get(name, digest) != digest:
            raise DataChanged(
                f"{name} has changed since this run began, and what it has trained and measured would not be "
                "comparable: give the file back, or begin another run (output=...)"
            )
