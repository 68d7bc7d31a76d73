"""What crosses from training to what is held out: users, items, whole windows, and the future."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from rankwise.recommend.logs.parts import Part, scan
from rankwise.recommend.splits import PARTS, Case, person

WINDOW = 3  # items before a target that make it the same question
_HELD_OUT = PARTS[1:]


def leaks(parts: Sequence[Part]) -> dict[str, int]:
    """Of a log that was split: what each held-out part shares with training, and what training has of its future.

    Counted are held-out targets of users who train too; those whose title no training interaction has; those that
    follow the same three items as the same target does in training; and training interactions that are not earlier than
    the first held-out target.
    """
    before = [pl.col("title").shift(back).over("user").fill_null("") for back in range(WINDOW, 0, -1)]
    window = pl.concat_str(*before, "title", separator="\0").hash()
    window = pl.when(pl.col("position") >= WINDOW).then(window)  # a shorter history asks another question
    who = person(scan(parts).collect_schema().names())
    names = ("title", "time", "part", "case", "window")
    targets = pl.concat(scan([part]).with_columns(window=window).select(pl.col(who), *names) for part in parts)
    train, found = targets.filter(pl.col("part") == "train"), dict[str, int]()
    for name in _HELD_OUT:
        held_out = targets.filter(pl.col("case") & (pl.col("part") == name))
        found |= _crossing(train, held_out, name)
        first = held_out.select(pl.col("time").min()).collect(engine="streaming")["time"]
        later = train.join(first.to_frame("first").lazy(), how="cross").filter(pl.col("time") >= pl.col("first"))
        found[f"training interactions at or after the first {name} target"] = _count(later)
        found[f"{name} targets of users who train too"] = _matched(held_out, train, who)
    return found


def leaks_of_cases(train: Iterable[Case], held_out: dict[str, Sequence[Case]]) -> dict[str, int]:
    """Of published cases, which have no users and no times: as :func:`leaks`, for titles and windows."""
    known = _windows(train)
    found: dict[str, int] = {}
    for name, cases in held_out.items():
        found |= _crossing(known, _windows(cases), name)
    return found


def _windows(cases: Iterable[Case]) -> pl.LazyFrame:
    rows = [(_window(case), case.target) for case in cases]
    return pl.DataFrame(rows, schema={"window": pl.String, "title": pl.String}, orient="row").lazy()


def _window(case: Case) -> str | None:
    return "\0".join((*case.history[-WINDOW:], case.target)) if len(case.history) >= WINDOW else None


def _crossing(train: pl.LazyFrame, held_out: pl.LazyFrame, name: str) -> dict[str, int]:
    total = _count(held_out)
    return {
        f"{name} targets that training never saw": total - _matched(held_out, train, "title"),
        f"{name} targets after the same {WINDOW} items as in training": _matched(held_out, train, "window"),
    }


def _matched(some: pl.LazyFrame, others: pl.LazyFrame, name: str) -> int:
    known = others.select(name).unique()
    return _count(some.join(known, on=name, how="semi"))


def _count(frame: pl.LazyFrame) -> int:
    return int(frame.select(pl.len()).collect(engine="streaming").item())
