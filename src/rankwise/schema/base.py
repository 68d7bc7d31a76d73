"""What every section of a recipe is, and the types that they share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

EMBEDDED = "embedded"
TAKEN = {"con", "prn", "aux", "nul", *(f"{device}{number}" for device in ("com", "lpt") for number in range(10))}


def _expand(path: str) -> str:
    """A path with ``~`` and environment variables filled in."""
    expanded = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - beside expandvars, which Path has not
    if "$" in expanded:
        raise ValueError("an environment variable in it is not set: set it, or write the path out")
    return expanded


def _possible(path: str) -> str:
    """A path that a system takes: an impossible one would not even be looked for."""
    if "\0" in path or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ValueError("no file can have this name: give the path of one")
    return path


def of_any_system(name: str) -> str:
    """A name that every system takes for a file or a folder.

    Raises:
        ValueError: Windows takes none of this name.
    """
    if name.endswith(".") or name.partition(".")[0].lower() in TAKEN:
        raise ValueError(f"Windows takes no file of the name {name!r}: choose another")
    return name


def repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, letters' case aside: to some systems these are one file."""
    before: set[str] = set()
    for name in names:
        if name.casefold() in before:
            return name
        before.add(name.casefold())
    return None


def _iso(value: object) -> object:
    """A date as text: YAML reads one that is not quoted as a date."""
    return value.isoformat() if isinstance(value, date) else value


FolderName = Annotated[str, AfterValidator(of_any_system)]  # of a file or a folder that is made for it
FileName = Annotated[str, AfterValidator(_possible)]
File = Annotated[FileName, AfterValidator(_expand), AfterValidator(_possible)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Names = Annotated[list[str], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Moment = Annotated[int | float | str, BeforeValidator(_iso)]
Part = Literal["minor", "principal", "middle", "random"]
StartPart = Literal["minor", "principal", "middle", "random", "qr"]
Layout = Literal["uniform", "compact", "own", "merged"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
