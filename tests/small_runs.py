"""Small data of every kind, and recipes over them that run in a second or two on the small Llama."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.recipes import make_recipe
from rankwise.recommend.synthetic import SyntheticSettings, write_synthetic
from rankwise.schema import Recipe

COLOURS, THINGS = ("red", "green", "blue", "grey"), ("fox", "river", "film", "name", "dog", "model")
SFT = {"kind": "sft", "epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
LONG = SFT | {"epochs": 8, "batch_size": 2, "learning_rate": 3e-2}
DPO = {"kind": "softmax_dpo", "start": "sft", "batch_size": 8, "learning_rate": 5e-3, "rows": 24}


def text(folder: Path) -> dict[str, Any]:
    """Sentences, one a line."""
    sentences = [f"The {colour} {thing} had a name." for colour in COLOURS for thing in THINGS]
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    return {"kind": "text", "train": str(folder / "text.txt"), "separator": "\n"}


def instructions(folder: Path) -> dict[str, Any]:
    """Questions with answers that follow from them."""
    rows = [
        {"prompt": f"Question: which is the {colour} {thing}?", "completion": f" The {thing}."}
        for colour in COLOURS
        for thing in THINGS
    ]
    return {"kind": "instructions", "train": _jsonl(folder / "instructions.jsonl", rows)}


def maths(folder: Path) -> dict[str, Any]:
    """Sums of small numbers, worked out in a few words."""
    rows = [
        {"question": f"{a} and {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(5)
        for b in range(5)
    ]
    return {"kind": "maths", "train": _jsonl(folder / "maths.jsonl", rows), "tokens": 32}


def choices(folder: Path) -> dict[str, Any]:
    """Questions of two sets, in the form of LLM-Adapters."""
    for name, words in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        (folder / "sets" / name).mkdir(parents=True)
        rows = [
            {
                "instruction": f"Is the {thing} {colour}?\n\nAnswer format: {'/'.join(words)}",
                "input": "",
                "output": f"the correct answer is {words[number % 2]}",
                "answer": words[number % 2],
            }
            for number, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS)
        ]
        for part in ("train", "test"):
            (folder / "sets" / name / f"{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {"kind": "choices", "train": str(folder / "sets"), "validation": str(folder / "sets"), "tokens": 12}


def preferences(folder: Path) -> dict[str, Any]:
    """Questions with a right answer and three wrong ones."""
    rows = [
        {
            "prompt": f"Question: which is the {colour} {thing}?",
            "chosen": f" The {thing}.",
            "rejected": [f" The {other}." for other in THINGS if other != thing][:3],
        }
        for colour in COLOURS
        for thing in THINGS
    ]
    return {"kind": "preferences", "train": _jsonl(folder / "preferences.jsonl", rows)}


def classification(folder: Path) -> dict[str, Any]:
    """Sentences whose last word tells the label."""
    rows = [
        {"sentence1": f"The {colour} {thing} is {word}", "label": word}
        for colour in COLOURS
        for thing in THINGS
        for word in ("lazy", "quick")
    ]
    random.Random(0).shuffle(rows)
    return {"kind": "classification", "train": _jsonl(folder / "labels.jsonl", rows)}


def glue(folder: Path) -> dict[str, Any]:
    """Pairs of sentences whose likeness is a value (STS-B, in GLUE's own form)."""
    lines = ["index\tsentence1\tsentence2\tscore"]
    for colour in COLOURS:
        for thing in THINGS:
            lines += [f"0\tThe {thing}\tThe {thing}\t5.0", f"1\tThe {thing}\tA {colour} thing\t{len(colour) / 2}"]
    (folder / "STS-B").mkdir()
    for part in ("train", "dev"):
        (folder / "STS-B" / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"kind": "glue", "task": "stsb", "folder": str(folder)}


def interactions(folder: Path) -> dict[str, Any]:
    """A small synthetic log."""
    settings = SyntheticSettings(users=16, interactions=7, series=2, parts=2, singles=3)
    ratings, items = write_synthetic(folder / "log", settings)
    return {
        "kind": "interactions",
        "interactions": str(ratings),
        "items": str(items),
        "candidates": 5,
        "negatives": 3,
        "history": 2,
        "rows": 32,
    }


def sdpo(folder: Path) -> dict[str, Any]:
    """Candidate lists as the S-DPO authors write them."""
    generator = random.Random(1)
    paths = {}
    for part, number in (("train", 16), ("validation", 4), ("test", 6)):
        cases = [_case(generator) for _ in range(number)]
        paths[part] = str(folder / f"{part}.json")
        Path(paths[part]).write_text(json.dumps(cases), encoding="utf-8")
    return {"kind": "sdpo", "template": "artists", "candidates": 5, "negatives": 2, **paths}


def _case(generator: random.Random) -> dict[str, Any]:
    names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    past, listed = generator.sample(names, 2), generator.sample(names, 5)
    return {"historyList": "::".join(past), "itemList": listed, "trueSelection": listed[0]}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# For each kind of data: its section, the adapter and the stages.
KINDS: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "text": (text, {"kind": "milora", "r": 4}, [LONG]),
    "instructions": (instructions, {"kind": "lora", "r": 4}, [LONG]),
    "maths": (maths, {"kind": "milora", "r": 4}, [LONG]),
    "choices": (
        choices,
        {"kind": "milora", "r": 4},
        [SFT, DPO | {"name": "softmax-DPO", "negatives": 1, "rows": 12}],
    ),
    "preferences": (
        preferences,
        {"kind": "milora", "r": 4},
        [SFT, DPO | {"name": "softmax-DPO", "negatives": 2, "draw": "candidates"}],
    ),
    "classification": (
        classification,
        {"kind": "sora", "r": 4, "threshold": 0.03, "gate_lr": 0.05},
        [SFT | {"epochs": 4}],
    ),
    "glue": (glue, {"kind": "lora", "r": 4}, [SFT | {"epochs": 4}]),
    "interactions": (
        interactions,
        {"kind": "milora", "r": 4},
        [SFT, DPO | {"name": "DPO", "negatives": 1}, DPO | {"name": "softmax-DPO", "negatives": 3}],
    ),
    "sdpo": (
        sdpo,
        {"kind": "lora", "r": 4},
        [SFT | {"loss": "row"}, DPO | {"name": "softmax-DPO", "negatives": 2, "rows": 8}],
    ),
}


def values(kind: str, folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over data of one kind, which is written into the folder; the run goes to ``folder / "run"``."""
    folder.mkdir(parents=True, exist_ok=True)
    data, adapter, stages = KINDS[kind]
    return {
        "name": kind,
        "model": {"path": str(base), "context": 128},
        "adapter": adapter,
        "data": data(folder),
        "stages": [dict(stage) for stage in stages],
        "output": str(folder / "run"),
    } | changes


def recipe(kind: str, folder: Path, base: Path, **changes: Any) -> Recipe:
    """The same, checked."""
    return make_recipe(values(kind, folder, base, **changes))


def silent() -> Console:
    """A console of no terminal, whose text is kept."""
    return Console(file=io.StringIO(), width=140)


def printed(console: Console) -> str:
    """What a silent console was given."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
