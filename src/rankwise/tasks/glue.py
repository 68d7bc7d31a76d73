"""GLUE (arXiv 1804.07461): its nine tasks as they are published, from a folder or from the hub, with their measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.tasks.classification import NO_LABEL, NO_SENTENCE
from rankwise.tasks.label_scores import LabelMetric
from rankwise.tasks.tables import as_text, columns_of, read_rows

HUB = "nyu-mll/glue"
VALUE = "score"  # what STS-B's values are called where labels have names
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        folder: of its published files.
        sentences: its columns of one or two sentences, as they are called in one place or another.
        labels: its column of the label, likewise.
        names: of the labels, by number; none for values.
        metrics: GLUE's own.
        columns: of files without a header.
        other: a second part to measure on, by the name that its metrics get.
    """

    folder: str
    sentences: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[LabelMetric, ...]
    columns: tuple[str, ...] = ()
    other: str | None = None


PAIR = ("sentence1", "sentence2")
STS_COLUMNS = ("genre", "file", "year", "id", "score", *PAIR)
TASKS = {
    "cola": GlueTask(
        "CoLA",
        (("sentence",),),
        ("label",),
        ("unacceptable", "acceptable"),
        ("Matthews",),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", (("sentence",), ("content",)), ("label",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(
        "MRPC",
        (("#1 String", "#2 String"), PAIR),
        ("Quality", "label"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "F1"),
    ),
    "stsb": GlueTask("STS-B", (PAIR,), ("score", "label"), (), ("Pearson", "Spearman")),
    "qqp": GlueTask(
        "QQP",
        (("question1", "question2"),),
        ("is_duplicate", "label"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "F1"),
    ),
    "mnli": GlueTask(
        "MNLI",
        (PAIR, ("premise", "hypothesis")),
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        other="mismatched",
    ),
    "qnli": GlueTask("QNLI", (("question", "sentence"),), ("label",), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": GlueTask("RTE", (PAIR,), ("label",), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": GlueTask("WNLI", (PAIR,), ("label",), ("not_entailment", "entailment"), ("accuracy",)),
}
DEV = {"mnli": "dev_matched"}
DEV_ON_HUB = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}


def read_glue(name: str, part: str, folder: Path | None) -> tuple[Rows, dict[str, int]]:
    """Rows of ``sentence1``, ``sentence2`` where there are two, and ``label``: a number, or STS-B's value.

    Args:
        name: of the task, as the hub calls it: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.
        part: ``train``, ``dev``, or ``other``: MNLI's mismatched dev part.
        folder: of the tasks' folders, or of the task's own files: GLUE's .tsv (for STS-B also the .csv of its own
            publication), or the hub's Parquet. Where it is None, the hub's files are loaded, or found in its cache.

    Returns:
        The rows, and what was dropped.

    Raises:
        UserError: there is no such file, it cannot be read, or no row is usable.
    """
    task = TASKS[name]
    path = _path(name, part, folder)
    rows, counts = _read(path, task)
    present = columns_of(rows)
    sentences = next((names for names in task.sentences if present.issuperset(names)), None)
    label = next((one for one in task.labels if one in present), None)
    if sentences is None or label is None:
        wanted = " or ".join(", ".join(names) for names in task.sentences)
        raise UserError(f"{path} has not the columns of {task.folder} ({wanted}, and {' or '.join(task.labels)})")
    kept: Rows = []
    for row in rows:
        cells = {key: as_text(row.get(column)) for key, column in zip(PAIR, sentences, strict=False)}
        value = _label(as_text(row.get(label)).strip(), task.names)
        if value is None or not all(cells.values()):
            count(counts, NO_LABEL if value is None else NO_SENTENCE)
        else:
            kept.append({**cells, "label": value})
    if not kept:
        raise UserError(f"{path} holds no row with a sentence and a label of {task.folder} ({counts})")
    return kept, counts


def _label(text: str, names: Sequence[str]) -> int | float | None:
    """A label's number by its name or number, or a value; None where it is neither."""
    if text in names:
        return names.index(text)
    try:
        value = float(text)
    except ValueError:
        return None
    if not names:
        return value if 0 <= value <= 5 else None
    return int(value) if value in range(len(names)) else None


def _read(path: Path, task: GlueTask) -> tuple[Rows, dict[str, int]]:
    if path.suffix == ".parquet":
        return read_rows(path)
    columns = STS_COLUMNS if path.suffix == ".csv" else task.columns
    if columns:
        return read_rows(path, delimiter="\t", header=False, columns=columns, quoting=False)
    return read_rows(path, delimiter="\t", quoting=False)


def _path(name: str, part: str, folder: Path | None) -> Path:
    """The file of a part."""
    task = TASKS[name]
    file = part if part == "train" else f"dev_{task.other}" if part == "other" else DEV.get(name, "dev")
    return _loaded(name, file) if folder is None else _found(name, task, file, folder)


def glue_files(name: str, folder: Path) -> list[Path]:
    """The files in a folder that a task reads.

    Raises:
        UserError: one is not there.
    """
    return [_path(name, part, folder) for part in ("train", "dev", *(["other"] if TASKS[name].other else []))]


def _found(name: str, task: GlueTask, file: str, folder: Path) -> Path:
    hub = DEV_ON_HUB.get(file, file)
    names = [f"{file}.tsv", f"sts-{file}.csv", f"{hub}-00000-of-00001.parquet", f"{hub}.parquet"]
    for place in (folder / task.folder, folder / name, folder):
        for path in (place / one for one in names):
            if path.is_file():
                return path
    wanted = names[:2] if name == "stsb" else names[:1]
    raise UserError(
        f"data.folder {folder} holds no {file} part of {task.folder}: it, or {task.folder}/ in it, should hold "
        f"{' or '.join(wanted)}, or the hub's {names[2]}"
    )


def _loaded(name: str, file: str) -> Path:
    wanted = f"{name}/{DEV_ON_HUB.get(file, file)}-00000-of-00001.parquet"
    try:
        return Path(hf_hub_download(HUB, wanted, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{wanted} of {HUB} cannot be loaded: {reason}; give data.folder") from error


def label_names(name: str) -> list[str]:
    """The labels of a task, by number; one for STS-B's value."""
    return list(TASKS[name].names) or [VALUE]


def parts_of(name: str, folder: Path | None) -> Mapping[str, tuple[Rows, dict[str, int]]]:
    """The part to train on, the one to measure on, and MNLI's second one of these, by its name."""
    other = TASKS[name].other
    found = {part: read_glue(name, part, folder) for part in ("train", "dev")}
    return found if other is None else found | {other: read_glue(name, "other", folder)}
