"""What is fuzzed: for each reader sound inputs, and a function that reads one and looks at what came out.

A target raises nothing but ``UserError``, of one line that is not long. It is not to be fed files that are compressed
columns: polars itself aborts on some that are broken.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.errors import UserError

SECONDS = 20  # that a reader may take: it hangs, where it takes more
RECIPE = {
    "name": "films",
    "model": {"path": "embedded", "context": 128},
    "adapter": {"kind": "milora", "r": 4, "target_modules": ["q_proj"], "dropout": 0.1},
    "data": {"kind": "text", "train": "text.txt", "separator": "\n"},
    "stages": [{"kind": "sft", "epochs": 2, "batch_size": 8, "learning_rate": 0.01}],
    "evaluation": {"texts": {"news": "news.txt"}, "noise_share": 0.2},
    "output": "runs/films",
    "seed": 1,
}
PREFERENCE = {
    "data": {"kind": "interactions", "interactions": "log.csv", "items": "items.csv", "candidates": 5, "history": 2},
    "stages": [
        {"kind": "sft"},
        {"kind": "softmax_dpo", "name": "DPO", "negatives": 1, "start": "sft", "learning_rate": 5e-3},
    ],
    "output": "runs/films",
}
COMPARISON = {
    "name": "small",
    "methods": ["lora", {"kind": "milora", "r": 4, "name": "small"}],
    "tasks": {"words": {"data": RECIPE["data"] | {"validation": "b.txt"}, "stages": RECIPE["stages"]}},
    "learning_rates": [0.01, 0.001],
    "seeds": [0, 1],
    "output": "runs/small",
}
RESULTS = {
    "task": "text",
    "columns": ["loss", "HR@1"],
    "rows": [
        {"name": "base model", "metrics": {"loss": 2.5, "HR@1": 0.1}, "cases": 10, "intervals": {"loss": [2.1, 2.9]}},
        {
            "name": "sft",
            "metrics": {"loss": 1.5, "HR@1": 0.4},
            "cases": 10,
            "training_metrics": {"loss": 1.0},
            "training_cases": 5,
            "adapter": {"gates": 8, "gates_left": 4, "parameters_left": 64},
        },
    ],
    "counts": {"documents": 10},
    "seconds": {"sft": 1.5},
    "export": {"layout": "uniform", "relative_error": 1e-7},
    "drift": {"training": {"0": 1.0, "1": 0.9}},
    "labels": ["yes", "no"],
}
RANKS = [
    {"module": f"model.layers.{n}.{kind}", "rank": 4, "live": 3, "initial_rank": 4} for n in (0, 1) for kind in "qv"
]
METRICS = [{"stage": "sft", "step": n, "loss": 3 / n, "gates_left": 9 - n, "threshold": n / 9} for n in range(1, 5)]
ROWS = [{"prompt": "Is it red?", "answer": "yes", "n": 1, "score": 0.5, "tags": ["a", "b"], "none": None}] * 3
CSV = 'user,item,time,rating,title\nu1,"i, 1",1700000000,5,Heat\nu2,i2,2020-01-02T03:04:05,4.5,"The ""Matrix"""\n'
CASES = [{"historyList": "Heat::Casino", "itemList": ["Ronin", "Heat", "Alien"], "trueSelection": "Ronin"}] * 2
WINDOWS = [{"seq": [0, 1, 2, 9], "len_seq": 3, "next": 1}, {"seq": [2, 1, 0], "next": 2}]
SIDE = {"format": 1, "config": {"r": 4, "peft_type": "MILORA", "target_modules": ["q"]}, "base": {"q": "00ff"}}
ASKED = [
    {"history": ["Heat", "Ronin"], "top": 3, "most_nodes": 9, "stage": "sft"},
    {"user": "u1", "candidates": ["a", "b"]},
]


class Target(NamedTuple):
    """A reader.

    Attributes:
        name: of the file that is broken.
        seeds: sound contents of it.
        read: reads the file, and fails where what it gives is not sound.
        beside: other files of its folder.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    beside: dict[str, bytes] = {}  # noqa: RUF012 - of a tuple, never changed


def check(target: Target, folder: Path, content: bytes) -> None:
    """Read one content in a folder: what it gives is sound, or one line says why there is nothing."""
    for name, other in {**target.beside, target.name: content}.items():
        (folder / name).write_bytes(other)
    try:
        with time_limit(SECONDS):
            target.read(folder / target.name)
    except UserError as error:
        assert 0 < len(str(error)) < 4000 and "\n" not in str(error)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail where the block takes longer: it would hang."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def lines(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def data(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def text(value: Any) -> bytes:
    import yaml

    return yaml.safe_dump(value, sort_keys=False).encode()


def can_be_written(value: Any) -> None:
    """JSON in UTF-8, as ``--json`` prints it and files hold it."""
    json.dumps(value, ensure_ascii=False, default=str).encode()


# Recipes and templates


def recipe(path: Path) -> None:
    from rankwise.recipes import dump_recipe, load_recipe

    read = load_recipe(path)
    path.write_text(dump_recipe(read), encoding="utf-8")
    assert load_recipe(path) == read


def comparison(path: Path) -> None:
    from rankwise.recipes import load_comparison

    can_be_written(load_comparison(path).model_dump(mode="json"))


def override(path: Path) -> None:
    from rankwise.recipes import dump_recipe, make_recipe

    found = path.read_bytes().decode("utf-8", errors="surrogateescape").split("\n")
    dump_recipe(make_recipe(RECIPE, found)).encode()


def template(path: Path) -> None:
    from rankwise.recommend.prompts import load_template

    found = load_template(path)
    about = {"Heat": dict.fromkeys(found.attributes, "x")}
    can_be_written([found.render(["Heat", "{a}"], ["b"], about=about, ratings=[None, 1.0]), found.render_answer("{")])


# Tables and logs


def table(path: Path, **options: Any) -> None:
    from rankwise.tasks.tables import as_text, read_rows

    rows, counts = read_rows(path, **options)
    assert rows and all(isinstance(row, dict) and row for row in rows) and all(counts.values())
    can_be_written(rows)
    [as_text(value) for row in rows for value in row.values()]


def log(path: Path) -> None:
    from rankwise.recommend.logs.interactions import InteractionColumns, read_log

    for whole, broken in read_log(path, InteractionColumns(), "told"):
        if whole.width > 1:
            assert not sum(whole.select("user", "item", "time").null_count().row(0)) and whole["time"].is_finite().all()
        can_be_written(broken.to_dicts())


def literals(path: Path) -> None:
    from rankwise.recommend.logs.reading import Form, read_table

    can_be_written([table.to_dicts() for table in read_table(path, Form(literals=True))])


def latin(path: Path) -> None:
    from rankwise.recommend.logs.reading import Form, read_table

    form = Form(separator="::", names=("user", "item", "rating", "time"), encoding="latin-1", quoting=False)
    can_be_written([table.to_dicts() for table in read_table(path, form)])


def items(path: Path) -> None:
    from rankwise.recommend.logs.items import ItemColumns, read_items

    listed, _ = read_items(path, ItemColumns(), tidy=True)
    assert not listed["title"].null_count() and not listed["item"].is_duplicated().any()


def saved_dataset(path: Path) -> None:
    from rankwise.recommend.logs.reading.files import files

    assert all(file.parent == path.parent for file in files(path.parent))


def candidate_lists(path: Path) -> None:
    from rankwise.recommend.published import read_candidate_lists

    cases, _ = read_candidate_lists(path)
    assert all(case.target in case.candidates and case.history for case in cases)
    can_be_written([[*case.history, case.target, *case.candidates] for case in cases])


def windows(path: Path) -> None:
    from rankwise.recommend.published import read_windows

    cases, _ = read_windows(path, {0: "Heat", 1: "Casino", 2: "Ronin"}, 1)
    assert all(case.history and {*case.history, case.target} <= {"Heat", "Casino", "Ronin"} for case in cases)


def names(path: Path) -> None:
    from rankwise.recommend.published import read_names

    can_be_written(read_names(path))


# Folders that rankwise wrote


@functools.cache
def stored() -> dict[str, bytes]:
    import io

    import polars as pl

    from rankwise.recommend.store import HISTORIES, TITLES

    titles = {"title": ["Casino", "Heat"], "popularity": [1, 2], "items": [["i1"], ["i2", "i3"]]}
    files = {TITLES: titles, HISTORIES: {"user": ["u1"], "titles": [["Heat"]]}}
    found = {}
    for name, columns in files.items():
        buffer = io.BytesIO()
        pl.DataFrame(columns).write_parquet(buffer)
        found[name] = buffer.getvalue()
    return found


def store(path: Path) -> None:
    from rankwise.recommend.store import read_store

    read = read_store(path.parent)
    read.template.render(read.history("u1"), about=read.about)
    assert read.find(["heat"]) == ["Heat"] and read.most_history >= 0


def run_folder(path: Path) -> None:
    from rankwise.analysis.report import render
    from rankwise.analysis.runfolder import read_run

    render(read_run(path.parent)).encode()


def results(path: Path) -> None:
    from rankwise.analysis.results import read_results
    from rankwise.analysis.tables import result_markdown

    found = read_results(path.parent)
    if found:
        result_markdown(found).encode()


def token(path: Path) -> None:
    from rankwise.serving.settings import ServerSettings, read_token

    ServerSettings(token=read_token(path, {}))


def users(path: Path) -> None:
    from rankwise.commands import _lines

    assert all(line.strip() for line in _lines(path))


def batch_settings(path: Path) -> None:
    from rankwise.recommend.batch import _open

    _open(path.parent, {"users": ["u1"], "top": 3})


def index(path: Path) -> None:
    from rankwise.models.index import read_index

    assert all((path.parent / name).parent == path.parent and name != ".." for name in read_index(path.parent).values())


def side(path: Path) -> None:
    from rankwise.directions.checkpoint import read_side

    can_be_written(read_side(path.parent))


def cell(path: Path) -> None:
    from rankwise.analysis.results import check_rows
    from rankwise.reading import read_json

    check_rows(path, found := read_json(path, dict, "run it again"), "run it again")
    assert math.isfinite(len(found["rows"]))


TARGETS = {
    "recipe": Target("recipe.yaml", [text(RECIPE), text(PREFERENCE)], recipe),
    "comparison": Target("comparison.yaml", [text(COMPARISON)], comparison),
    "override": Target("words.txt", [b"stages.0.epochs=2\nadapter.r=8", b"evaluation.texts.news=a.txt"], override),
    "template": Target(
        "mine.yaml",
        [
            text(
                {
                    "name": "a",
                    "description": "b",
                    "prompt": "{history}\n{candidates}:",
                    "separator": ", ",
                    "answer": " {title}",
                }
            )
        ],
        template,
    ),
    "json-table": Target("t.json", [data(ROWS)], table),
    "jsonl-table": Target("t.jsonl", [lines(ROWS)], table),
    "csv-table": Target("t.csv", [CSV.encode()], table),
    "tsv-table": Target("t.tsv", [CSV.replace(",", "\t").encode()], functools.partial(table, quoting=False)),
    "csv-log": Target("log.csv", [CSV.encode()], log),
    "jsonl-log": Target("log.jsonl", [lines([{"user": "a", "item": "b", "time": 1.7e9, "rating": 3}] * 3)], log),
    "gzip-log": Target("log.csv.gz", [gzip.compress(CSV.encode(), mtime=0)], log),
    "literal-log": Target("log.json", [b"{'user': u'a', 'items': ['b', 1.5, None]}\n{'user': \"c\"}\n"], literals),
    "latin-log": Target("log.dat.gz", [gzip.compress("u1::caf\xe9::5::9\n".encode("latin-1") * 3, mtime=0)], latin),
    "items": Target("items.csv", [b'item,title\ni1,"Matrix, The (1999)"\ni2,Heat\n'], items),
    "saved-dataset": Target(
        "state.json", [data({"_data_files": [{"filename": "a.arrow"}]})], saved_dataset, {"a.arrow": b"ARROW1"}
    ),
    "candidate-lists": Target("cases.json", [data(CASES)], candidate_lists),
    "windows": Target("windows.jsonl", [lines(WINDOWS)], windows),
    "names": Target("id2name.txt", [b"0::Heat\n1::Casino\n"], names),
    "store": Target(
        "settings.json",
        [
            data(
                {
                    "most_history": 3,
                    "template": {
                        "name": "a",
                        "description": "",
                        "prompt": "{history}:",
                        "separator": ", ",
                        "answer": " {title}",
                    },
                }
            )
        ],
        store,
        stored(),
    ),
    "run-results": Target("results.json", [data(RESULTS)], run_folder, {"metrics.jsonl": lines(METRICS)}),
    "run-metrics": Target("metrics.jsonl", [lines(METRICS)], run_folder, {"results.json": data(RESULTS)}),
    "run-ranks": Target("ranks.json", [data(RANKS)], run_folder, {"results.json": data(RESULTS)}),
    "run-recipe": Target(
        "recipe.yaml", [text(RECIPE), text(PREFERENCE)], run_folder, {"metrics.jsonl": lines(METRICS)}
    ),
    "run-versions": Target(
        "versions.json", [data({"rankwise": "1", "torch": None})], run_folder, {"recipe.yaml": b"a: 1"}
    ),
    "results": Target("results.json", [data(RESULTS)], results),
    "token": Target("token", [b"abcdefghijklmnop\n"], token),
    "users": Target("users.txt", [b"u1\nu2\n"], users),
    "batch-settings": Target("settings.json", [data({"users": ["u1"], "top": 3})], batch_settings),
    "index": Target("model.safetensors.index.json", [data({"weight_map": {"a": "model-1.safetensors"}})], index),
    "side-file": Target("milora.json", [data(SIDE)], side),
    "cell": Target("cell.json", [data(RESULTS | {"seconds": 1.5})], cell),
}
