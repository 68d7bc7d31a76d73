"""What `preference_study.py` runs, and in which order: one factor at a time around a default.

The default: after supervised fine-tuning of all its weights the model gets a new MiLoRA adapter (r = 16 on all linear
layers), which is trained once on 2,000 rows that are new to it, with softmax-DPO, three rejected answers drawn from the
row's candidates, beta 1 and rate 1e-4. On MovieLens only the first runs of some groups are made.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Entry = dict[str, Any]

SHORT, MIDDLE, LONG = 2_000, 8_000, 24_000  # rows of supervised fine-tuning
LISTED = 4_000  # more rows of it, with the candidates in the prompt
SUPERVISED_RATES = (3e-4, 1e-3, 3e-3)
LISTED_RATE = 3e-4
SEEDS = (0, 1, 2)  # of the runs on test; the first is that of validation
# How many runs of a group there are on MovieLens, where only what decides the test is measured; all of "start".
FEWER = {"start": 6, "rate and K": 9, "control": 4, "list in prompt": 7, "faster, list in prompt": 4}
BASE, POPULARITY = "base", "popularity"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        data: ``lastfm`` or ``movielens``.
        kind: ``measure`` (nothing is trained), ``supervised``, ``preference``, or ``more``: supervised training that
            goes on, on the same rows, for as many tokens as the preference run with ``negatives`` computes.
        start: folder of the supervised run that it begins with, or ``base``.
        listed: whether the prompt lists the candidates.
        weights: ``milora`` or ``all``.
        rate: the highest learning rate.
        rows: of training.
        passes: over them.
        new: whether the rows are of users that supervised training has not seen.
        negatives: how many rejected answers a row has.
        source: where they are drawn from.
        beta: of the loss.
        reference: what the loss compares with: the ``start``, or ``none``.
        sft_weight: of the chosen answer's cross-entropy in it.
        loss: of supervised training: over the ``row`` or over its ``answer``.
        seed: of rows, their order, negatives and adapters.
        split: what is measured at the end.
    """

    data: str
    kind: str
    start: str
    listed: bool = False
    weights: str = "milora"
    rate: float = 1e-4
    rows: int = 2000
    passes: float = 1.0
    new: bool = True
    negatives: int = 3
    source: str = "candidates"
    beta: float = 1.0
    reference: str = "start"
    sft_weight: float = 0.0
    loss: str = "row"
    seed: int = 0
    split: str = "validation"

    @property
    def folder(self) -> str:
        """Of what a supervised run leaves: a whole model."""
        listed = "-listed" if self.listed else ""
        return f"{self.data}{listed}-{self.rows}-{self.rate:g}-seed{self.seed}"

    @property
    def name(self) -> str:
        """The data, the kind, where it starts from, and what differs from the default."""
        changed = [field.name for field in fields(self) if field.default != getattr(self, field.name)]
        said = [f"{name}={_short(getattr(self, name))}" for name in changed if name not in ("data", "kind", "start")]
        return " ".join([self.data, self.kind, f"from {self.start}", *said])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def of(entry: Entry) -> Run:
    """The run of an entry."""
    return Run(**entry["run"])


def supervised_rate(entries: Sequence[Entry], data: str) -> float | None:
    """Of the rates that were tried on few rows, the one with the most probable answers; None until all are there."""
    found = {of(one).rate: one for one in entries if of(one) in short_runs(data)}
    if len(found) < len(SUPERVISED_RATES):
        return None
    return max(found, key=lambda rate: (found[rate]["metrics"] or {"chosen": -float("inf")})["chosen"])


def short_runs(data: str) -> list[Run]:
    return [Run(data, "supervised", BASE, weights="all", rate=rate, rows=SHORT) for rate in SUPERVISED_RATES]


def supervised(data: str, rate: float, seed: int = 0) -> dict[str, Run]:
    """The starts by their length; ``listed`` goes on from the longest."""
    made = {
        name: Run(data, "supervised", BASE, weights="all", rate=rate, rows=rows, seed=seed)
        for name, rows in (("short", SHORT), ("middle", MIDDLE), ("long", LONG))
    }
    made["listed"] = Run(
        data, "supervised", made["long"].folder, True, "all", LISTED_RATE, LISTED, loss="answer", seed=seed
    )
    return made


def plan(entries: Sequence[Entry], data: str) -> Iterator[tuple[str, Run]]:
    """Groups and runs on validation; the most telling first. A run may be in several groups."""
    counts: Counter[str] = Counter()
    for group, run in _everything(entries, data):
        counts[group] += 1
        if data != "movielens" or counts[group] <= FEWER.get(group, 0):
            yield group, run


def _everything(entries: Sequence[Entry], data: str) -> Iterator[tuple[str, Run]]:
    yield "start", Run(data, "measure", BASE)
    yield "start", Run(data, "measure", POPULARITY)
    for run in short_runs(data):
        yield "start", run
    starts = supervised(data, supervised_rate(entries, data) or SUPERVISED_RATES[1])
    yield "start", starts["long"]
    default = Run(data, "preference", starts["long"].folder)
    more = replace(default, kind="more")
    for rate, negatives in itertools.product((1e-4, 1e-5, 1e-3), (3, 1, 15)):
        yield "rate and K", replace(default, rate=rate, negatives=negatives)
    for loss, rate in itertools.product(("row", "answer"), (1e-4, 1e-3)):
        yield "control", replace(more, rate=rate, loss=loss)
    for negatives in (8, 5):
        yield "rate and K", replace(default, negatives=negatives)
    for rate, negatives in itertools.product((3e-4, 1e-6), (3, 1, 15)):
        yield "rate and K", replace(default, rate=rate, negatives=negatives)
    for loss, rate in itertools.product(("row", "answer"), (1e-5, 3e-4)):
        yield "control", replace(more, rate=rate, loss=loss)
    for source in ("popularity", "hard", "uniform"):
        yield "negatives", replace(default, source=source)
    for weight, rate in itertools.product((1.0, 0.1), (1e-4, 1e-3)):
        yield "SFT term", replace(default, sft_weight=weight, rate=rate)
    for rate, beta in ((1e-4, 0.1), (1e-4, 3.0), (1e-4, 0.5), (1e-3, 0.1), (1e-3, 3.0)):
        yield "beta", replace(default, rate=rate, beta=beta)
    for rate in (1e-5, 1e-4):
        yield "all weights", replace(default, weights="all", rate=rate)
        yield "all weights", replace(more, weights="all", rate=rate)
    for rate, negatives in ((1e-6, 3), (1e-3, 3), (1e-5, 1)):
        yield "all weights", replace(default, weights="all", rate=rate, negatives=negatives)
    yield from _rows(default, more)
    yield from _less_converged(starts, default, more)
    yield from _listed(starts["listed"])
    yield from _no_reference(default)
    for seed in SEEDS[1:]:
        yield "seeds", replace(default, seed=seed)


def _rows(default: Run, more: Run) -> Iterator[tuple[str, Run]]:
    for run in (default, more):
        yield "rows", replace(run, new=False)
    yield "rows", replace(default, rows=500)
    yield "rows", replace(default, rows=4000)
    yield "rows", replace(default, passes=3.0)
    yield "rows", replace(default, passes=3.0, new=False)


def _less_converged(starts: dict[str, Run], default: Run, more: Run) -> Iterator[tuple[str, Run]]:
    for name in ("short", "middle"):
        yield "less SFT", starts[name]
        for rate in (1e-4, 1e-3):
            yield "less SFT", replace(default, start=starts[name].folder, rate=rate)
        yield "less SFT", replace(more, start=starts[name].folder, rate=1e-3)


def _no_reference(default: Run) -> Iterator[tuple[str, Run]]:
    """At beta 1 the loss then is the cross-entropy of the answer among its candidates."""
    free = replace(default, reference="none", negatives=15, rate=1e-3)
    yield "no reference", free
    yield "no reference", replace(free, rate=1e-4)
    yield "no reference", replace(free, beta=0.3)
    yield "no reference", replace(free, weights="all", rate=1e-4)
    for negatives in (3, 1):
        yield "no reference", replace(free, negatives=negatives)
    yield "no reference", replace(free, sft_weight=1.0)
    yield "no reference", replace(free, source="hard", negatives=3)


def _listed(start: Run) -> Iterator[tuple[str, Run]]:
    yield "list in prompt", start
    default = Run(start.data, "preference", start.folder, listed=True, rows=1000)
    for rate, negatives in ((1e-4, 3), (1e-3, 3), (1e-4, 1), (1e-5, 3)):
        yield "list in prompt", replace(default, rate=rate, negatives=negatives)
    more = replace(default, kind="more", loss="answer")
    for rate in (1e-4, 1e-3):
        yield "list in prompt", replace(more, rate=rate)
    fast = {"rate": 3e-3}
    for run in (default, more, replace(default, negatives=1), replace(default, negatives=15)):
        yield "faster, list in prompt", replace(run, **fast)
    for run in (default, more):
        yield "faster, list in prompt", replace(run, rows=4000, **fast)
    yield "faster, list in prompt", replace(default, rate=1e-2)
    yield "faster, list in prompt", replace(default, reference="none", **fast)
    yield "faster, list in prompt", replace(default, weights="all", rate=3e-4)
    for negatives in (1, 15):
        yield "faster, list in prompt", replace(default, negatives=negatives, rows=4000, **fast)


def chosen(entries: Sequence[Entry], data: str, listed: bool) -> dict[str, Run]:
    """The best of DPO, softmax-DPO and the control, from the most supervised start, by HR@1 on validation, then MRR.

    Runs without a reference have another loss than the two, and are not chosen from.
    """
    rate = supervised_rate(entries, data)
    if rate is None:
        return {}
    start = supervised(data, rate)["listed" if listed else "long"].folder
    best: dict[str, Entry] = {}
    for one in entries:
        run = of(one)
        if (run.start, run.split, run.seed) != (start, "validation", 0) or run.kind == "measure" or not one["metrics"]:
            continue
        if run.kind == "supervised" or run.reference == "none":
            continue
        family = run.kind if run.kind == "more" else "DPO" if run.negatives == 1 else "softmax-DPO"
        if family not in best or _quality(one) > _quality(best[family]):
            best[family] = one
    return {family: of(best[family]) for family in ("more", "DPO", "softmax-DPO") if family in best}


def _quality(entry: Entry) -> tuple[float, float]:
    return entry["metrics"]["HR@1"], entry["metrics"]["MRR"]


def finals(entries: Sequence[Entry], data: str) -> Iterator[tuple[str, Run]]:
    """Supervised runs of every seed, and what was chosen, on test."""
    yield "test", Run(data, "measure", BASE, split="test")
    yield "test", Run(data, "measure", POPULARITY, split="test")
    rate = supervised_rate(entries, data)
    for listed, seed in itertools.product((False, True), SEEDS):
        found = chosen(entries, data, listed)
        if rate is None or not found:
            continue
        starts = supervised(data, rate, seed)
        start = starts["listed" if listed else "long"]
        if seed != SEEDS[0]:
            yield "test", starts["long"]
            yield "test", start
        yield "test", Run(data, "measure", start.folder, listed, split="test", seed=seed)
        for run in found.values():
            yield "test", replace(run, start=start.folder, seed=seed, split="test")


def needed(run: Run, runs: Sequence[Run]) -> Run | None:
    """The supervised run that it begins with; None where there is none."""
    return next((one for one in runs if one.kind == "supervised" and one.folder == run.start), None)


def spec(run: Run) -> Entry:
    """As an entry keeps it."""
    return asdict(run)
