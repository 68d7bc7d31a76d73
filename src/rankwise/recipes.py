"""Reading a recipe: YAML with overrides, checked whole before anything slow happens."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from rankwise.errors import UserError, cut, nearest, shown
from rankwise.reading import DEPTH, parse_yaml, read_yaml
from rankwise.schema import Comparison, Recipe, Section

Read = TypeVar("Read", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML, apply ``key=value`` overrides and check all of it.

    Args:
        path: a YAML file.
        overrides: such as ``stages.0.epochs=2``; values are YAML.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key or value is not possible.
    """
    return make_recipe(_values(Path(path), Recipe, "recipe"), overrides, str(path))


def make_recipe(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Check plain data, with overrides applied, as a recipe; errors as for :func:`load_recipe`."""
    return _checked(Recipe, values, overrides, source)


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read what `rankwise compare` runs; arguments and errors as for :func:`load_recipe`."""
    return make_comparison(_values(Path(path), Comparison, "comparison"), overrides, str(path))


def make_comparison(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "comparison") -> Comparison:
    """Check plain data, with overrides applied, as a comparison; errors as for :func:`load_recipe`."""
    return _checked(Comparison, values, overrides, source)


def _values(path: Path, kind: type[Section], what: str) -> dict[str, Any]:
    """What a YAML file holds, a mapping."""
    values = read_yaml(path, what)
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} is no mapping: it needs the keys {', '.join(kind.model_fields)}")
    return values


def _checked(kind: type[Read], values: dict[str, Any], overrides: Sequence[str], source: str) -> Read:
    values = copy.deepcopy(values)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {shown(override)} has no '=': write it as key=value, as in stages.0.epochs=2")
        _put(values, key, parse_yaml(value, f"override {shown(override)}"), shown(override))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, kind)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every value it was run with, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _put(values: Any, keys: str, value: Any, override: str) -> None:
    """Set a value deep in mappings and lists; missing mappings are made."""
    *path, last = keys.split(".")
    if len(path) > DEPTH:
        raise UserError(f"override {override}: a key has at most {DEPTH + 1} parts")
    for key in path:
        if isinstance(values, list):
            values = _item(values, key, override)
        else:
            values = values.setdefault(key, {})
        if not isinstance(values, dict | list):
            raise UserError(f"override {override}: {shown(key)} holds a value, no mapping or list")
    if isinstance(values, list):
        _item(values, last, override)
        values[int(last)] = value
    else:
        values[last] = value


def _item(values: list[Any], key: str, override: str) -> Any:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(values):
        raise UserError(f"override {override}: {shown(key)} is no position in a list of {len(values)}, counted from 0")
    return values[int(key)]


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake, as one line: where, what was given, what would be accepted."""
    errors = error.errors(include_url=False)
    start = _walk(errors[0]["loc"], root)[0]
    # Of several types that a value may have, each says what it is not; the one that it nearly has says most.
    rivals = [one for one in errors if _walk(one["loc"], root)[0][: len(start)] == start]
    first = min(rivals, key=lambda one: (one["type"].endswith("_type"), -len(one["loc"])))
    location, section = _walk(first["loc"], root)
    place = cut(".".join(map(str, location)), 200)
    if first["type"] == "extra_forbidden":
        return f"{place} is unknown: {nearest(str(location[-1]), section.model_fields)}"
    if first["type"] == "union_tag_invalid":
        known = first["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{place}.kind {shown(first['ctx']['tag'])} is unknown: {nearest(first['ctx']['tag'], known)}"
    if first["type"] == "union_tag_not_found":
        return f"{place}.kind is missing: it says what {place} is"
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return f"{place} {shown(first['input'])} is unknown: {nearest(first['input'], known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place} {shown(first['input'])}: {message}" if place else message


def _walk(location: Sequence[Any], root: type[BaseModel]) -> tuple[list[Any], type[BaseModel]]:
    """A place in the recipe without the kinds and types that pydantic puts into it, and the section of its last key."""
    section = root
    place: list[Any] = []
    kinds: dict[Any, type[Section]] = {}
    is_type = False  # where a field may have several, the next part says which one was tried
    for part in location:
        if part in kinds and isinstance(part, str):
            section, kinds = kinds[part], {}
            continue
        if is_type:
            is_type = False
            continue
        place.append(part)
        if isinstance(part, int) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        found = _sections(annotation)
        tagged = {
            word: each
            for each in found
            if "kind" in each.model_fields
            for word in get_args(each.model_fields["kind"].annotation)[:1]
        } or {form: found[0] for form in _forms(annotation)}
        if tagged:
            kinds = tagged
        elif found:
            section = found[0]
        is_type = not tagged and len(_types(annotation)) > 1
    return place, section


def _types(annotation: Any) -> list[Any]:
    """The types that a field's value may have, None aside."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for inner in get_args(annotation) for found in _types(inner)]
    return [] if annotation is type(None) else [annotation]


def _forms(annotation: Any) -> list[str]:
    """The tags by which a field that can be written in several forms tells them apart."""
    if isinstance(annotation, Tag):
        return [annotation.tag]
    return [found for inner in get_args(annotation) for found in _forms(inner)]


def _sections(annotation: Any) -> list[type[Section]]:
    """Every section class inside a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]
