"""Prompt templates as data: what a user saw, and maybe a list to choose from, as a text to complete."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from rankwise.errors import UserError, cut, nearest, shown
from rankwise.reading import parse_yaml, read_yaml

RATING, TITLE = "rating", "title"
_TAKEN = ("item", "items", "popularity", "user")  # what other columns are called


@dataclass(frozen=True)
class Template:
    """A prompt and its answer.

    Both are tokenised apart, so no space ends the prompt, and one begins the answer.
    A title that is inserted may hold any characters, braces too.
    """

    name: str
    description: str
    prompt: str  # holds {history}, and {candidates} where the answer is to be chosen from a list
    separator: str  # between two titles of a list
    answer: str  # holds {title}; begins with a space or a line break
    item: str = "{title}"  # of a history: may hold {rating}, and columns of the item list such as {genres}
    unknown: str = "unknown"  # what a rating or column without a value is called

    @property
    def shows_candidates(self) -> bool:
        """Whether the prompt lists the candidates."""
        return "candidates" in _placeholders(self.prompt)

    @property
    def shows_ratings(self) -> bool:
        """Whether a history tells how its items were rated."""
        return RATING in _placeholders(self.item)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The columns of the item list that a history tells."""
        return tuple(dict.fromkeys(name for name in _placeholders(self.item) if name not in (RATING, TITLE)))

    def render(
        self,
        history: Sequence[str],
        candidates: Sequence[str] = (),
        *,
        about: Mapping[str, Mapping[str, str | None]] | None = None,
        ratings: Sequence[float | None] = (),
    ) -> str:
        """The prompt for a history (oldest first) and the candidates in the order given.

        Args:
            history: titles.
            candidates: titles.
            about: the attributes of titles.
            ratings: of the history's titles, as many; unknown where there are none.
        """
        items = [
            self._item(title, (about or {}).get(title, {}), rating)
            for title, rating in zip(history, ratings or [None] * len(history), strict=True)
        ]
        shown = self.prompt.format(history=self.separator.join(items), candidates=self.separator.join(candidates))
        return shown if self.prompt[-1].isspace() else shown.rstrip()  # a chat's turn begins with a line break

    def _item(self, title: str, about: Mapping[str, str | None], rating: float | None) -> str:
        if self.item == "{title}":
            return title
        values = {name: about.get(name) or self.unknown for name in self.attributes}
        if self.shows_ratings:
            values[RATING] = self.unknown if rating is None else f"{rating:g}"
        return self.item.format(title=title, **values)

    def render_answer(self, title: str) -> str:
        """The text of an answer: what the model is to write after the prompt."""
        return self.answer.format(title=title)


def template_names() -> list[str]:
    """Names of the templates that are shipped, sorted."""
    folder = resources.files("rankwise.recommend") / "templates"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_template(name: str | Path | Template) -> Template:
    """A shipped template by name, or a user's own by the path of a YAML file; a template itself stays as it is.

    Raises:
        UserError: there is no such template or file, or the file is no valid template.
    """
    if isinstance(name, Template):
        return name
    if isinstance(name, Path) or name.endswith((".yaml", ".yml")) or "/" in name:
        return _parse(read_yaml(Path(name), "template"), str(name))
    if name not in template_names():
        raise UserError(
            f"unknown template {name!r}; {nearest(name, template_names())}, or give the path of a YAML file"
        )
    file = resources.files("rankwise.recommend") / "templates" / f"{name}.yaml"
    return _parse(parse_yaml(file.read_text(encoding="utf-8"), f"template {name}"), name)


def _parse(content: Any, source: str) -> Template:
    known = [field.name for field in fields(Template)]
    if not isinstance(content, dict):
        raise UserError(f"template {source}: must be a mapping with {', '.join(known)}")
    for key in content:
        if key not in known:
            raise UserError(f"template {source}: unknown key {shown(key)}; {nearest(str(key), known)}")
    for key in known:
        if not isinstance(content.get(key, getattr(Template, key, None)), str):
            raise UserError(f"template {source}: {key} = {shown(content.get(key))} must be a text")
    return _checked(Template(**{**content, "prompt": content["prompt"].rstrip()}), source)


def _checked(template: Template, source: str) -> Template:
    _check_placeholders(template.prompt, source, "prompt", required="history", known=("history", "candidates"))
    _check_placeholders(template.answer, source, "answer", required="title", known=("title",))
    _check_placeholders(template.item, source, "item", required="title")
    taken = [name for name in template.attributes if name in _TAKEN]
    if taken:
        raise UserError(f"template {source}: a column {taken[0]!r} cannot be told in item: give it another name")
    if not template.answer[0].isspace():
        raise UserError(f"template {source}: answer = {shown(template.answer)} must begin with a space or a line break")
    if not template.separator:
        raise UserError(f"template {source}: separator is empty, so that titles would run together")
    return template


def _check_placeholders(text: str, source: str, key: str, required: str, known: Sequence[str] | None = None) -> None:
    try:
        found = _placeholders(text)
    except ValueError as error:
        raise UserError(f"template {source}: {key}: {error}; a brace that is meant is written twice") from error
    for name in found:
        if known is None and not name.isidentifier():
            raise UserError(f"template {source}: {{{cut(name, 80)}}} in {key} is no name of a column")
        if known is not None and name not in known:
            hint = nearest(name, known)
            raise UserError(f"template {source}: unknown placeholder {{{cut(name, 80)}}} in {key}; {hint}")
    if required not in found:
        raise UserError(f"template {source}: {key} has no {{{required}}}")


def _placeholders(text: str) -> list[str]:
    """Names in braces, with any index, conversion or format, which then is unknown and refused."""
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, name, form, conversion in string.Formatter().parse(text)
        if name is not None
    ]
