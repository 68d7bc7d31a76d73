"""The tables of `preference_study.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from study_measures import rank_differences
from study_plan import BASE, LONG, Entry, Run, chosen, of, plan
from timing import table

RANKING = ("HR@1", "NDCG@5", "MRR")
PROTOCOL = ("HR@1 greedy", "HR@1 greedy of valid", "valid ratio")
HEAD = ["run", *RANKING, "log-loss", "nats", "nats a token", "HR@1 - start", "log-loss - start", "nats - start"]


def line(entry: Entry) -> str:
    """A finished run in short."""
    run, found = of(entry), entry["metrics"]
    if found is None:
        return f"{run.name}: {entry['error']}"
    values = ", ".join(f"{name} {found[name]:.4f}" for name in (*RANKING, "log-loss", "chosen") if name in found)
    against = entry.get("against start", {}).get("HR@1")
    change = f", HR@1 {difference(against)} of the start's" if against else ""
    return f"{run.name}: {values}{change} ({entry['seconds']['all']:.0f} s)"


def difference(pair: Sequence[float], digits: int = 3) -> str:
    """A difference ± its standard error; what is more than two of them from 0 in bold."""
    value, error = pair
    text = f"{value:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(value) > 2 * error else f"{text} (within 2)"


def report(lines: Sequence[Entry], datas: Sequence[str]) -> str:
    """All that there is so far."""
    if not lines:
        return "no runs yet"
    entries, parts = lines[1:], [", ".join(f"{name} {value}" for name, value in lines[0].items())]
    parts += ["A difference ± its standard error is on the same cases; those beyond two standard errors are in bold."]
    for data in datas:
        own = [one for one in entries if of(one).data == data]
        if own:
            parts += [f"## {data}", *validation_tables(own, data), *best_tables(own, data), *test_tables(own)]
    return "\n\n".join(parts)


def validation_tables(entries: Sequence[Entry], data: str) -> Iterator[str]:
    """A table for each group of the plan, and the course of each run of it."""
    found = {of(one): one for one in entries}
    groups: dict[str, list[Entry]] = {}
    for group, run in plan(entries, data):
        if run in found:
            groups.setdefault(group, []).append(found[run])
    for group, runs in groups.items():
        cases = runs[0]["cases"]
        yield f"{group}: {cases} cases of validation\n\n{table(HEAD, [cells(one) for one in runs])}"
        trained = [one for one in runs if one.get("course")]
        if trained:
            yield f"{group}: nats of the chosen answer (its margin) over training, some cases\n\n{courses(trained)}"


def label(run: Run) -> str:
    """The method, its rate, and what differs from the default."""
    if run.kind == "measure":
        return "SFT" if "seed" in run.start else run.start
    kind = {"supervised": "SFT", "more": f"more SFT, loss of the {run.loss}", "preference": method(run)}[run.kind]
    said = [kind, f"rate {run.rate:g}"]
    names = ["rows", "passes", "new", "source", "beta", "reference", "sft_weight", "seed"]
    names += ["weights"] if run.kind != "supervised" else []
    said += [f"{name} {getattr(run, name)}" for name in names if getattr(run, name) != getattr(Run, name)]
    if f"-{LONG}-" not in run.start and run.start != BASE and not run.listed:
        said.append(f"after {run.start.split('-')[1]} rows of SFT")
    return ", ".join(said)


def method(run: Run) -> str:
    return "DPO" if run.negatives == 1 else f"softmax-DPO-{run.negatives}"


def cells(entry: Entry) -> list[str]:
    found = entry["metrics"]
    if found is None:
        return [label(of(entry)), entry["error"], *["-"] * (len(HEAD) - 2)]
    values = [f"{found[name]:.4f}" for name in RANKING]
    values += [f"{found[name]:.3f}" if name in found else "-" for name in ("log-loss", "chosen", "chosen per token")]
    against = entry.get("against start", {})
    changes = [difference(against[name]) if name in against else "-" for name in ("HR@1", "log-loss", "chosen")]
    return [label(of(entry)), *values, *changes]


def courses(entries: Sequence[Entry]) -> str:
    points = list(dict.fromkeys(point for one in entries for point in one["course"]))
    points.sort(key=float)
    rows = []
    for one in entries:
        known = one["course"]
        values = [f"{known[at]['chosen']:.2f} ({known[at]['margin']:.2f})" if at in known else "-" for at in points]
        rows.append([label(of(one)), *values, f"{one['seconds']['training']:.0f} s", f"{one['peak_mib']} MiB"])
    return table(["run", *(f"{float(at):.0%}" for at in points), "training", "peak memory"], rows)


def best_tables(entries: Sequence[Entry], data: str) -> Iterator[str]:
    """What was chosen for the test, and each against the control on the same cases."""
    for listed in (False, True):
        best = chosen(entries, data, listed)
        found = {of(one): one for one in entries}
        rows = []
        for family, run in best.items():
            one = found[run]
            row = [family, label(run), f"{one['metrics']['HR@1']:.4f}", difference(one["against start"]["HR@1"])]
            if family != "more" and "more" in best:
                pairs = rank_differences(one["ranks"], found[best["more"]]["ranks"])
                row += [difference(pairs[name]) for name in ("HR@1", "MRR")]
            rows.append([*row, *["-"] * (6 - len(row))])
        if rows:
            where = "the prompt lists the candidates" if listed else "no list in the prompt"
            head = ["", "run", "HR@1", "HR@1 - start", "HR@1 - control", "MRR - control"]
            yield f"chosen on validation, {where}; being the best of many, they look better than they are\n\n" + table(
                head, rows
            )


def test_tables(entries: Sequence[Entry]) -> Iterator[str]:
    """Means over seeds ± standard deviation, and the difference from the start of the same seed."""
    for listed in (False, True):
        groups: dict[str, list[Entry]] = {}
        for one in entries:
            run = of(one)
            if run.split == "test" and run.listed == listed and one["metrics"]:
                groups.setdefault(label(replace(run, seed=0)), []).append(one)
        if groups:
            head = ["", "seeds", *RANKING, "nats", *PROTOCOL, "HR@1 - start, of each seed"]
            where = "the prompt lists the candidates" if listed else "no list in the prompt"
            rows = [test_cells(name, runs) for name, runs in groups.items()]
            cases = next(iter(groups.values()))[0]["cases"]
            yield f"test, {where}: {cases} cases\n\n{table(head, rows)}"


def test_cells(name: str, runs: Sequence[Entry]) -> list[str]:
    ordered = sorted(runs, key=lambda one: of(one).seed)
    values = [spread([one["metrics"].get(column) for one in ordered]) for column in (*RANKING, "chosen", *PROTOCOL)]
    changes = [difference(one["against start"]["HR@1"]) for one in ordered if "against start" in one]
    return [name, str(len(ordered)), *values, "; ".join(changes) or "-"]


def spread(values: Sequence[float | None], digits: int = 4) -> str:
    """Mean, and standard deviation of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"
