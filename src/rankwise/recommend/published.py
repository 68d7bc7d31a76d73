"""Published next-item data as its authors wrote it: S-DPO's candidate lists and LLaRA's windows of item ids.

There are no users in it: a case is named by its file and place. Both fix the order of events and no times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UserError, shown
from rankwise.reading import parse_json
from rankwise.recommend.logs.leaks import leaks_of_cases
from rankwise.recommend.prompts import Template, load_template
from rankwise.recommend.rows import Prepared, RowSettings, build, check_rows
from rankwise.recommend.splits import Case

_KEYS = ("historyList", "itemList", "trueSelection")


@dataclass(frozen=True, kw_only=True)
class PublishedSettings(RowSettings):
    """The files: ``.json`` is a list of S-DPO cases; ``.jsonl`` holds LLaRA windows, which need names."""

    train: Path
    validation: Path
    test: Path
    names: Path | None = None  # id2name.txt: "0::Morcheeba", one a line
    minimum_history: int = 3  # windows with fewer items are left out, as in the paper
    template: str | Path | Template = "artists-candidates"


def prepare_published(settings: PublishedSettings) -> Prepared:
    """Read the three parts and render their rows.

    Cases with candidates keep them; windows get some, drawn by seed from the catalogue (all titles of the
    names and of the parts) outside the window itself, as the authors do: the data does not tell which windows
    are one user's. Popularity counts every target and history item of the training part, so that an item
    inside several windows counts as often.

    Raises:
        UserError: a file is missing, empty or of another form, or a setting is wrong.
    """
    check_rows(settings)
    template = load_template(settings.template)
    if template.attributes or template.shows_ratings:
        told = ", ".join((*template.attributes, *(["rating"] if template.shows_ratings else [])))
        raise UserError(f"template {template.name!r} tells {told} of each item, which published lists have not")
    names = None if settings.names is None else read_names(settings.names)
    parts: dict[str, list[Case]] = {}
    counts: Counter[str] = Counter()
    for part in ("train", "validation", "test"):
        parts[part], found = _read_part(getattr(settings, part), names, settings.minimum_history)
        counts.update({f"{part} {name}": number for name, number in found.items()})
    catalogue = sorted({*(names or {}).values()}.union(*(_titles(case) for cases in parts.values() for case in cases)))
    return build(
        _Lists(parts, catalogue),
        settings,
        counts,
        popularity=_popularity(parts["train"]),
        most_history=max(len(case.history) for cases in parts.values() for case in cases),
        leaks=leaks_of_cases(parts["train"], {name: parts[name] for name in ("validation", "test")}),
    )


@dataclass(frozen=True)
class _Lists:
    """Cases in memory as a :class:`rankwise.recommend.rows.Source`."""

    parts: Mapping[str, Sequence[Case]]
    catalogue: Sequence[str]

    def pool(self, part: str) -> Sequence[str]:
        return self.catalogue

    def size(self, part: str) -> int:
        return len(self.parts[part])

    def cases(self, part: str, picks: Sequence[int]) -> Iterable[Case]:
        return (self.parts[part][place] for place in picks)


def _read_part(path: Path, names: Mapping[int, str] | None, minimum: int) -> tuple[list[Case], dict[str, int]]:
    if path.suffix == ".jsonl":
        if names is None:
            raise UserError(f"{path}: windows of item ids need names: give the path of id2name.txt")
        return read_windows(path, names, minimum)
    return read_candidate_lists(path)


def read_candidate_lists(path: Path) -> tuple[list[Case], dict[str, int]]:
    """S-DPO's form: a JSON list of ``historyList`` ("A::B", oldest first), ``itemList``, ``trueSelection``.

    Dropped and counted: unparsable cases, an empty history or list, a true selection that is not in the list,
    a list that has a title twice.

    Raises:
        UserError: the file is missing, no JSON list, or has no usable case.
    """
    content = _load(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: must be a JSON list of cases with {', '.join(_KEYS)}")
    problems: Counter[str] = Counter()
    cases = []
    for place, value in enumerate(content):
        case = _candidate_case(f"{path.stem}-{place}", value)
        if isinstance(case, Case):
            cases.append(case)
        else:
            problems[case] += 1
    return _some(path, cases, len(content), problems)


def _candidate_case(name: str, value: Any) -> Case | str:
    """The case, or the reason why it is none."""
    if not isinstance(value, dict) or any(key not in value for key in _KEYS):
        return "unparsable cases"
    history, listed, target = (value[key] for key in _KEYS)
    past = history.split("::") if isinstance(history, str) else history
    if not (_is_texts(past) and _is_texts(listed) and isinstance(target, str)):
        return "unparsable cases"
    past = [title.strip() for title in past if title.strip()]
    candidates = [title.strip() for title in listed]
    if not past or not candidates:
        return "cases with an empty list"
    if target.strip() not in candidates:
        return "cases whose target is no candidate"
    if len(set(candidates)) < len(candidates):
        return "cases with a candidate twice"
    return Case(name, tuple(past), target.strip(), tuple(candidates), frozenset(past) | {target.strip()})


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(title, str) for title in value)


def read_names(path: Path) -> dict[int, str]:
    """Item names by id out of lines such as ``0::Morcheeba``.

    Raises:
        UserError: the file is missing or empty, or a line has another form.
    """
    names: dict[int, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        identifier, mark, name = line.partition("::")
        if not line.strip():
            continue
        if not mark or not identifier.strip().isdecimal() or len(identifier) > 19 or not name.strip():
            raise UserError(f"{path}: line {number} is {shown(line)}, not ID::NAME")
        names[int(identifier)] = name.strip()
    return names


def read_windows(path: Path, names: Mapping[int, str], minimum: int = 3) -> tuple[list[Case], dict[str, int]]:
    """LLaRA's form: JSON lines with ``seq`` (item ids, oldest first, padded), ``len_seq`` and ``next``.

    The padding is the id after the last name. The history is what is left without it, since ``len_seq`` says
    1 for an empty one. Dropped and counted: unparsable lines, windows with fewer than ``minimum`` items, ids
    without name.

    Raises:
        UserError: the file is missing or has no usable window.
    """
    padding = max(names, default=-1) + 1
    lines = [line for line in _text(path).split("\n") if line.strip()]
    problems: Counter[str] = Counter()
    cases = []
    for place, line in enumerate(lines):
        case = _window_case(f"{path.stem}-{place}", line, names, padding, minimum)
        if isinstance(case, Case):
            cases.append(case)
        else:
            problems[case] += 1
    return _some(path, cases, len(lines), problems)


def _window_case(name: str, line: str, names: Mapping[int, str], padding: int, minimum: int) -> Case | str:
    """The case, or the reason why it is none."""
    try:
        value = parse_json(line)
        ids = [int(identifier) for identifier in value["seq"] if identifier != padding]
        target = int(value["next"])
    except (ValueError, TypeError, LookupError, OverflowError):
        return "unparsable windows"
    if len(ids) < max(minimum, 1):
        return "windows with too short a history"
    if any(identifier not in names for identifier in (*ids, target)):
        return "windows with an item without title"
    past = tuple(names[identifier] for identifier in ids)
    return Case(name, past, names[target], seen=frozenset({*past, names[target]}))


def _some(path: Path, cases: list[Case], read: int, problems: Mapping[str, int]) -> tuple[list[Case], dict[str, int]]:
    if not cases:
        reasons = ", ".join(f"{number} {name}" for name, number in problems.items()) or "it is empty"
        raise UserError(f"{path}: no usable case of {read} ({reasons})")
    return cases, {"cases read": read, **problems}


def _text(path: Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def _load(path: Path) -> Any:
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from error


def _titles(case: Case) -> set[str]:
    return {*case.history, case.target, *case.candidates}


def _popularity(cases: Sequence[Case]) -> dict[str, int]:
    return dict(Counter(title for case in cases for title in _with_target(case)))


def _with_target(case: Case) -> Iterable[str]:
    return (*case.history, case.target)
