"""GLUE's nine tasks as they are published, and as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.recipes import make_recipe
from rankwise.tasks import files, glue, load
from rankwise.tasks.glue import TASKS, label_names, parts_of, read_glue
from rankwise.tasks.load import load_task

# Of each task: its dev file as GLUE has it, and what its rows are.
PUBLISHED: dict[str, tuple[str, str, list[Any]]] = {
    "cola": (
        "CoLA/dev.tsv",
        'gj04\t1\t\tA dog "barks.\ngj04\t0\t*\tDog a barks.\n',
        [('A dog "barks.', 1), ("Dog a barks.", 0)],
    ),
    "sst2": ("SST-2/dev.tsv", "sentence\tlabel\nfine film\t1\ndull\t0\n", [("fine film", 1), ("dull", 0)]),
    "mrpc": (
        "MRPC/dev.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no.\tHe refused.\n',
        [('He said "no.', "He refused.", 1)],
    ),
    "stsb": (
        "STS-B/dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\ts\ts\tA man.\tA person.\t3.800\n",
        [("A man.", "A person.", 3.8)],
    ),
    "qqp": (
        "QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n",
        [("Why?", "How?", 0)],
    ),
    "mnli": (
        "MNLI/dev_matched.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tIt rains.\tIt is dry.\tneutral\tcontradiction\n",
        [("It rains.", "It is dry.", 2)],
    ),
    "qnli": (
        "QNLI/dev.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tIt was I.\tentailment\n",
        [("Who?", "It was I.", 0)],
    ),
    "rte": ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA b.\tB.\tnot_entailment\n", [("A b.", "B.", 1)]),
    "wnli": (
        "WNLI/dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tHe fell.\tBob fell.\t1\n",
        [("He fell.", "Bob fell.", 1)],
    ),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_the_published_form_of_each_task(tmp_path: Path, name: str) -> None:
    file, text, rows = PUBLISHED[name]
    write(tmp_path / file, text)
    for folder in (tmp_path, (tmp_path / file).parent):
        found, counts = read_glue(name, "dev", folder)
        assert [tuple(row.values()) for row in found] == rows
        assert counts == {}


@pytest.mark.parametrize("name", TASKS)
def test_the_hubs_form_of_each_task(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are numbers there; a row of -1 has none. From a folder, and as it is downloaded."""
    task, asked = TASKS[name], []
    labels = [2.5, 4.0] if name == "stsb" else [0, len(task.names) - 1]
    data: dict[str, Any] = {column: ["One.", "Two.", "Three."] for column in task.sentences[-1]}
    if name == "sst2":
        data = {"sentence": data.pop("content")}
    part = "validation_matched" if name == "mnli" else "validation"
    path = tmp_path / name / f"{part}-00000-of-00001.parquet"
    path.parent.mkdir()
    pl.DataFrame({**data, "label": [*labels, -1.0 if name == "stsb" else -1], "idx": [0, 1, 2]}).write_parquet(path)

    def download(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return str(path)

    monkeypatch.setattr(glue, "hf_hub_download", download)
    for folder in (tmp_path, None):
        found, counts = read_glue(name, "dev", folder)
        assert [row["label"] for row in found] == labels
        assert [row["sentence1"] for row in found] == ["One.", "Two."]
        assert counts == {"rows without a label": 1}
    assert asked == [("nyu-mll/glue", f"{name}/{part}-00000-of-00001.parquet", "dataset")]


def test_the_names_of_labels() -> None:
    assert label_names("mnli") == ["entailment", "neutral", "contradiction"]
    assert label_names("stsb") == ["score"]


@pytest.mark.parametrize(
    ("name", "train", "dev", "ones"),
    [("rte", 2490, 277, 131), ("mrpc", 3668, 408, 279), ("sst2", 67349, 872, 444), ("stsb", 5749, 1500, 0)],
)
def test_real_files(real_data: Path, name: str, train: int, dev: int, ones: int) -> None:
    found = parts_of(name, real_data / "glue")
    assert [len(rows) for rows, _ in found.values()] == [train, dev]
    if ones:
        assert sum(row["label"] for row in found["dev"][0]) == ones
    else:
        assert {type(row["label"]) for row in found["dev"][0]} == {float}


def test_a_folder_without_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no train part of CoLA: it, or CoLA/ in it, should hold train.tsv, or"):
        read_glue("cola", "train", tmp_path)
    write(tmp_path / "RTE" / "train.tsv", "index\tpremise\tlabel\n0\ta\tentailment\n")
    with pytest.raises(UserError, match=r"train.tsv has not the columns of RTE \(sentence1, sentence2, and label\)"):
        read_glue("rte", "train", tmp_path)
    write(tmp_path / "RTE" / "train.tsv", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n")
    with pytest.raises(UserError, match="no row with a sentence and a label of RTE"):
        read_glue("rte", "train", tmp_path)


def test_the_hub_may_be_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nyu-mll/glue cannot be loaded: .*give data.folder"):
        read_glue("rte", "train", None)


def mnli(folder: Path) -> dict[str, Any]:
    head, names = "sentence1\tsentence2\tgold_label\n", TASKS["mnli"].names
    rows = [f"It is {word}.\tIt was.\t{names[number % 3]}\n" for number, word in enumerate("abcdefghi")]
    for part, number in (("train", 9), ("dev_matched", 6), ("dev_mismatched", 3)):
        write(folder / "MNLI" / f"{part}.tsv", head + "".join(rows[:number]))
    return {"kind": "glue", "task": "mnli", "folder": str(folder)}


def test_mnli_is_measured_on_both_its_parts_or_on_held_out_rows(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = mnli(tmp_path)
    made = load_task(recipe(tmp_path, data), tiny_tokenizer, 64)
    assert made.columns == ("accuracy", "accuracy mismatched")
    assert made.baselines()["most frequent"]().metrics == pytest.approx(
        {"accuracy": 1 / 3, "accuracy mismatched": 1 / 3}
    )
    held = load_task(recipe(tmp_path, data | {"measure": "holdout", "holdout": 0.34}), tiny_tokenizer, 64)
    assert (held.columns, len(held.sft_rows()), held.cases) == (("accuracy",), 6, 3)
    few = load_task(recipe(tmp_path, data | {"rows": 5}, {"cases": 3}), tiny_tokenizer, 64)
    assert few.counts == {"training rows left out": 4, "dev: rows left out": 3}


def test_mistakes_and_another_domain_are_measured_too(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "train.csv", "sentence1,label\nfine films are rare,good\nvery long and dull,bad\n")
    write(tmp_path / "books.csv", "sentence1,label\na fine book,good\n")
    data = {"kind": "classification", "train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "train.csv")}
    data["others"] = {"books": str(tmp_path / "books.csv")}
    noise = {"noise": ["characters", "dropped-words"], "noise_share": 0.9}
    made = load_task(recipe(tmp_path, data, noise), tiny_tokenizer, 64)
    others = ("books", "characters", "dropped-words")
    assert made.columns == ("accuracy", "F1", *(f"{metric} {name}" for name in others for metric in ("accuracy", "F1")))
    assert made.baselines()["most frequent"]().metrics["accuracy books"] == 1.0
    read = [{"sentence1": "fine films are rare", "label": 1}, {"sentence1": "very long and dull", "label": 0}]
    found = load.noisy(read, recipe(tmp_path, data, noise))
    assert [row["label"] for row in found["characters"]] == [1, 0]
    assert all(
        row["sentence1"] != one["sentence1"] for rows in found.values() for row, one in zip(rows, read, strict=True)
    )
    with pytest.raises(UserError, match=r"evaluation\.noise is for classification and glue, not text"):
        recipe(tmp_path, {"kind": "text", "train": "a.txt"}, noise)
    gone = recipe(tmp_path, data | {"others": {"books": str(tmp_path / "no.csv")}})
    with pytest.raises(UserError, match=r"data\.others\.books .*no\.csv does not exist"):
        files.check_files(gone.data)


def test_a_task_of_glue_on_another_domain(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        write(folder / name, "sentence\tlabel\nfine films are rare\t1\nvery long and dull\t0\n")
    write(tmp_path / "books.csv", "sentence1,label\na fine book,positive\na dull one,negative\nfine,positive\n")
    data = {"kind": "glue", "task": "sst2", "folder": str(tmp_path), "others": {"books": str(tmp_path / "books.csv")}}
    made = load_task(recipe(tmp_path, data), tiny_tokenizer, 64)
    assert made.columns == ("accuracy", "accuracy books")
    assert made.baselines()["most frequent"]().metrics["accuracy books"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    write(tmp_path / "books.csv", "sentence1,label\na fine book,good\n")
    with pytest.raises(UserError, match="good"):
        load_task(recipe(tmp_path, data), tiny_tokenizer, 64)
    with pytest.raises(UserError, match="others are files with labels, and task stsb has values"):
        recipe(tmp_path, data | {"task": "stsb"})


def recipe(folder: Path, data: dict[str, Any], evaluation: dict[str, Any] | None = None) -> Any:
    stages = [{"kind": "sft"}]
    return make_recipe({"data": data, "stages": stages, "evaluation": evaluation or {}, "output": str(folder / "run")})


def test_a_part_of_one_label_has_no_correlation(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for part in ("train", "dev"):
        write(tmp_path / f"{part}.tsv", "x\t1\t\tA dog barks.\nx\t1\t\tDogs bark.\n")
    data = {"kind": "glue", "task": "cola", "folder": str(tmp_path)}
    with pytest.raises(UserError, match="all 2 rows have the label 1, of which there is no Matthews"):
        load_task(recipe(tmp_path, data), tiny_tokenizer, 64)
