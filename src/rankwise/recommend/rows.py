"""From cases to rows with prompt, chosen and rejected answers, for any preference trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import polars as pl

from rankwise.errors import UserError
from rankwise.files import check_output, new_folder, write_json, write_jsonl
from rankwise.recommend.candidates import cannot_be_won, draw_negatives, with_candidates
from rankwise.recommend.prompts import Template, load_template
from rankwise.recommend.splits import PARTS, Case
from rankwise.sampling import picks

Row = dict[str, Any]
BROKEN = "broken_rows.jsonl"
UNWINNABLE = "{} cases that cannot be won by substring"
About = Mapping[str, Mapping[str, str | None]]  # attributes of titles
_NOBODY = pl.DataFrame(schema={"user": pl.String, "titles": pl.List(pl.String)})
_NOTHING = pl.DataFrame(schema={"item": pl.String, "title": pl.String})


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How cases become rows; the same for a log and for published data."""

    candidates: int = 20  # in a case, the target included
    negatives: int = 3  # rejected answers of a row, drawn from its candidates
    training_rows: int | None = None  # at most, drawn by seed; none for all
    evaluation_cases: int | None = None  # of validation and of test, at most each, drawn by seed; none for all
    template: str | Path | Template = "films"  # a shipped template's name or the path of one
    messages: bool = False  # whether prompts and answers are written to files as chat messages
    seed: int = 0


def check_rows(settings: RowSettings) -> None:
    """Refuse what can be refused before any file is read.

    Raises:
        UserError: the template, the candidates or the negatives are wrong.
    """
    load_template(settings.template)
    if settings.candidates < 2:
        raise UserError(f"candidates = {settings.candidates}: at least 2, the target and one other")
    if not 1 <= settings.negatives < settings.candidates:
        raise UserError(
            f"negatives = {settings.negatives}: between 1 and {settings.candidates - 1},"
            f" since they are drawn from {settings.candidates} candidates"
        )


@runtime_checkable
class Source(Protocol):
    """Where cases come from: a log, or published lists."""

    @property
    def catalogue(self) -> Sequence[str]:
        """The sorted titles to rank."""
        ...

    def pool(self, part: str) -> Sequence[str]:
        """The sorted titles that wrong answers of a part's cases are drawn from."""
        ...

    def size(self, part: str) -> int:
        """How many cases a part has."""
        ...

    def cases(self, part: str, picks: Sequence[int]) -> Iterable[Case]:
        """Those of a part that are picked, by place and in order."""
        ...


def picked(source: Source, part: str, settings: RowSettings) -> tuple[Sequence[int], dict[str, int]]:
    """The cases of a part that become rows, and the counts of these and of the others."""
    size = source.size(part)
    limit = settings.training_rows if part == "train" else settings.evaluation_cases
    chosen = picks(size, limit, settings.seed)
    return chosen, {f"{part} rows": len(chosen), f"{part} rows left out": size - len(chosen)}


def make_rows(
    cases: Iterable[Case],
    part: str,
    pool: Sequence[str],
    settings: RowSettings,
    counts: dict[str, int],
    about: About | None = None,
) -> Iterator[Row]:
    """A row for each case, its candidates and rejected answers drawn by the seed, the user and the target.

    Cases of which the papers' protocol can win none are counted in ``counts``.

    Raises:
        UserError: the pool of titles is too small for the candidates, or these for the rejected answers.
    """
    template = load_template(settings.template)
    unwinnable = UNWINNABLE.format(part)
    if part != "train":
        counts[unwinnable] = 0
    for bare in cases:
        case = with_candidates(bare, pool, settings.candidates, settings.seed)
        if part != "train":
            counts[unwinnable] += cannot_be_won(case.candidates, case.target)
        yield row_of(case, template, settings.negatives, settings.seed, part != "train", about)


def row_of(
    case: Case,
    template: Template,
    negatives: int,
    seed: int,
    list_candidates: bool = True,
    about: About | None = None,
) -> Row:
    """The row of a case; its ``negatives`` rejected answers are drawn by ``seed`` from its candidates.

    Args:
        case: with candidates.
        template: of the prompt and the answers.
        negatives: how many rejected answers there are.
        seed: of the draw.
        list_candidates: whether the row tells the candidates.
        about: the attributes of titles that the template tells.

    Raises:
        UserError: the case has too few candidates for the negatives.
    """
    row: Row = {
        "user": case.user,
        "prompt": template.render(case.history, case.candidates, about=about, ratings=case.ratings),
        "chosen": template.render_answer(case.target),
        "rejected": [template.render_answer(title) for title in draw_negatives(case, negatives, seed)],
        "target": case.target,
        "history": list(case.history),
        "seen": case.seen,
    }
    if list_candidates:
        row["candidates"] = list(case.candidates)
    return row


@dataclass(frozen=True, eq=False)  # frames have no truth value
class Prepared:
    """Rows of the three parts, the titles to rank, their popularity in training, and what was left out.

    ``histories`` has a row for each ``user`` of the log, with ``titles``: all that the user chose, the last two too,
    oldest first, and their ``ratings`` where the template tells them. ``items`` has each ``item`` (its id) with its
    ``title`` and what else the template tells of it, those that nobody chose too. Published files have neither users
    nor ids. ``broken`` has the rows of a log that could not be read: ``file``, ``row``, ``reason``
    and ``content``.

    A row of a part has ``user``, ``prompt``, ``chosen``, ``rejected`` (list), ``target``, ``history`` (titles) and
    ``seen`` (titles that are no wrong answers for this user: it is not written to files); a row of validation and test
    has ``candidates`` (titles, the target among them) too.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    catalogue: list[str]
    popularity: dict[str, int]
    counts: dict[str, int]
    most_history: int  # titles in a prompt
    pool: list[str]  # titles that wrong answers of training rows are drawn from
    histories: pl.DataFrame = field(default_factory=lambda: _NOBODY)
    items: pl.DataFrame = field(default_factory=lambda: _NOTHING)
    broken: pl.DataFrame = field(default_factory=pl.DataFrame)
    leaks: dict[str, int] = field(default_factory=dict)  # what crosses from training to what is held out


def build(
    source: Source, settings: RowSettings, counts: Mapping[str, int], attributes: About | None = None, **about: Any
) -> Prepared:
    """Rows out of the cases of ``train``, ``validation`` and ``test``, sampled and counted.

    Args:
        source: of the cases.
        settings: of the rows.
        counts: of what was read.
        attributes: of titles, which the template tells.
        **about: the other fields of :class:`Prepared`.
    """
    found = dict(counts)

    def made(part: str) -> list[Row]:
        chosen, sampled = picked(source, part, settings)
        found.update(sampled)
        cases = source.cases(part, chosen)
        return list(make_rows(cases, part, source.pool(part), settings, found, attributes))

    train, validation, test = (made(part) for part in PARTS)
    pool = list(source.pool("train"))
    return Prepared(train, validation, test, list(source.catalogue), counts=found, pool=pool, **about)


def write_rows(folder: Path, prepared: Prepared, messages: bool = False) -> Path:
    """Write ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, ``catalogue.json`` and ``counts.json``.

    The folder appears whole or not at all.

    Raises:
        UserError: the folder exists and is not empty.
    """
    folder = Path(folder)
    check_new(folder)
    with new_folder(folder) as temporary:
        for part in PARTS:
            write_jsonl(temporary / f"{part}.jsonl", (written(row, messages) for row in getattr(prepared, part)))
        catalogue, popularity = prepared.catalogue, prepared.popularity
        write_about(temporary, catalogue, popularity, prepared.counts, prepared.leaks, prepared.broken)
    return folder


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something, or cannot be made.

    Raises:
        UserError: it does, or cannot.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there and not empty; choose another folder or remove it first")
    check_output(folder)


def written(row: Row, messages: bool = False) -> Row:
    """What of a row goes to a file; prompt and answers as chat ``messages`` where these are wanted."""
    kept = {key: value for key, value in row.items() if key != "seen"}
    if messages:
        kept["prompt"] = _message("user", row["prompt"])
        kept["chosen"] = _message("assistant", row["chosen"])
        kept["rejected"] = [_message("assistant", answer) for answer in row["rejected"]]
    return kept


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text.strip()}]


def write_about(
    folder: Path,
    catalogue: Sequence[str],
    popularity: Mapping[str, int],
    counts: Mapping[str, int],
    leaks: Mapping[str, int],
    broken: pl.DataFrame,
) -> None:
    """Write ``catalogue.json``, ``counts.json``, ``leaks.json`` and, where rows were broken, ``broken_rows.jsonl``."""
    listed = [{"title": title, "popularity": popularity.get(title, 0)} for title in catalogue]
    write_json(folder / "catalogue.json", listed)
    write_json(folder / "counts.json", counts)
    write_json(folder / "leaks.json", leaks)
    if broken.height:
        write_jsonl(folder / BROKEN, broken.iter_rows(named=True))
