from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_runs
from rankwise.errors import UserError
from rankwise.models import load_tokenizer
from rankwise.tasks.classification import read_classification
from rankwise.tasks.labels import LabelTask
from rankwise.tasks.load import load_task


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(*labels: object) -> list[dict[str, Any]]:
    return [{"sentence1": f"text {place}", "label": label} for place, label in enumerate(labels)]


def test_one_sentence(tmp_path: Path) -> None:
    path = written(tmp_path, [{"review": "fine", "mood": "good"}, {"review": "dull", "mood": "bad"}])
    read = read_classification(path, sentence1="review", label="mood")
    assert read.label_names == ["bad", "good"]
    assert read.rows == [{"sentence1": "fine", "label": 1}, {"sentence1": "dull", "label": 0}]
    assert read.counts == {}


def test_two_sentences(tmp_path: Path) -> None:
    path = written(tmp_path, [{"a": "x", "b": "y", "label": 1}, {"a": "p", "b": "q", "label": 0}])
    read = read_classification(path, sentence1="a", sentence2="b")
    assert read.rows[0] == {"sentence1": "x", "sentence2": "y", "label": 1}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, "10"], ["9", "10"]),
        (["1", " -1"], ["-1", "1"]),
        ([True, False], ["False", "True"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        ([1.0, 0.0], ["0.0", "1.0"]),
    ],
)
def test_names_are_sorted_and_whole_numbers_by_value(tmp_path: Path, labels: list[object], names: list[str]) -> None:
    read = read_classification(written(tmp_path, labelled(*labels)))
    assert read.label_names == names
    assert [names[row["label"]] for row in read.rows] == [str(label).strip() for label in labels]


def test_rows_without_text_or_label_are_counted(tmp_path: Path) -> None:
    rows = [
        *labelled("a", "b", None, "", " "),
        {"sentence1": " ", "label": "a"},
        {"label": "b"},
        {"sentence1": 3},
        {"sentence1": "c", "label": math.nan},
    ]
    read = read_classification(written(tmp_path, rows))
    assert [row["label"] for row in read.rows] == [0, 1]
    assert read.counts == {"rows without a label": 5, "rows without a sentence": 2}


def test_validation_uses_the_names_of_training(tmp_path: Path) -> None:
    read = read_classification(written(tmp_path, labelled("c", "c")), label_names=["a", "b", "c"])
    assert [row["label"] for row in read.rows] == [2, 2]
    assert read.label_names == ["a", "b", "c"]


def test_a_label_unseen_in_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label 'd' does not occur in the training data, which has a, b"):
        read_classification(written(tmp_path, labelled("a", "d")), label_names=["a", "b"])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (labelled("a", "a"), {}, "every row has the label 'a'"),
        (labelled("5.000", "3.800"), {}, r"holds scores \(3.800, 5.000"),
        (labelled("a", "b"), {"label": "labels"}, "no column 'labels'; did you mean 'label'"),
        (labelled("a", "b"), {"sentence1": "text"}, "no column 'text'"),
        (labelled("a", "b"), {"sentence2": "sentence2"}, "no column 'sentence2'; did you mean 'sentence1'"),
        ([{"sentence1": "", "label": "a"}], {}, "no row with text in every one of sentence1, label"),
    ],
)
def test_bad_input(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_classification(written(tmp_path, rows), **options)


def test_rows_of_like_length_go_together_and_keep_their_order(tmp_path: Path, model_folder: Path) -> None:
    recipe = small_runs.recipe("classification", tmp_path, model_folder)
    tokenizer = load_tokenizer(str(model_folder))
    task = load_task(recipe, tokenizer, 64)
    assert isinstance(task, LabelTask)
    model, rows = task.load_model(), task._train[:30]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    alone = np.concatenate([task._outputs(model, [row]) for row in rows])
    np.testing.assert_allclose(task._outputs(model, rows), alone, rtol=1e-4, atol=1e-6)
    assert len(np.unique(alone.round(5), axis=0)) > 1


def test_real_paraphrases(data_folder: Path) -> None:
    folder = data_folder / "glue" / "MRPC"
    columns: dict[str, Any] = {
        "sentence1": "#1 String",
        "sentence2": "#2 String",
        "label": "Quality",
        "quoting": False,
    }
    train = read_classification(folder / "train.tsv", **columns)
    dev = read_classification(folder / "dev.tsv", label_names=train.label_names, **columns)
    assert (len(train.rows), len(dev.rows)) == (3668, 408)
    assert train.label_names == ["0", "1"]
    assert train.counts == dev.counts == {}
    # The shares of paraphrases that are published for the two parts.
    assert sum(row["label"] for row in train.rows) == 2474
    assert sum(row["label"] for row in dev.rows) == 279
    with pytest.raises(UserError, match="no column 'Quality'"):
        read_classification(folder / "test.tsv", label_names=train.label_names, **columns)


def test_real_entailment_and_sentiment(data_folder: Path) -> None:
    folder = data_folder / "glue"
    entailment = read_classification(folder / "RTE" / "dev.tsv", sentence2="sentence2", quoting=False)
    assert entailment.label_names == ["entailment", "not_entailment"]
    assert len(entailment.rows) == 277
    sentiment = read_classification(folder / "SST-2" / "train.tsv", sentence1="sentence", quoting=False)
    assert (len(sentiment.rows), sentiment.label_names) == (67_349, ["0", "1"])
