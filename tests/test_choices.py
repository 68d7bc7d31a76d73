"""Questions with choices, from LLM-Adapters' files to the shares answered right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.schema import ModelSettings
from rankwise.tasks import choices
from rankwise.tasks.choices import UNUSABLE, ChoiceTask, read_choices, written_choice


def row(question: str, answer: str, *names: str, **changes: Any) -> dict[str, Any]:
    made = {"instruction": f"{question}\n\nAnswer format: {'/'.join(names)}", "input": "", "answer": answer}
    return made | {"output": f"the correct answer is {answer}"} | changes


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_rejected_answers_name_the_other_choices(tmp_path: Path) -> None:
    names = ("answer1", "answer2", "answer3")
    path = write(tmp_path / "arc" / "train.json", [row("Why?", "answer2", *names)])
    found, counts = read_choices(path, "train")
    assert counts == {}
    assert found == [
        {
            "prompt": "### Task\nWhy?\n\nAnswer format: answer1/answer2/answer3\n\n### Answer\n",
            "chosen": "the correct answer is answer2",
            "rejected": ["the correct answer is answer1", "the correct answer is answer3"],
            "choices": ["answer2", "answer1", "answer3"],
            "set": "arc",
        }
    ]


def test_rows_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    rows = [
        row("Is it?", "true", "true", "false"),
        row("Is it?", "maybe", "true", "false"),
        row("Is it?", "true", "true"),
        row("Is it?", "true", "true", "false", output="yes"),
        row("Is it?", "true", "true", "false", instruction="Is it?"),
    ]
    found, counts = read_choices(write(tmp_path / "rows.json", rows), "train")
    assert (len(found), counts) == (1, {UNUSABLE: 4})
    with pytest.raises(UserError, match="holds no question that ends with 'Answer format: '"):
        read_choices(write(tmp_path / "none.json", rows[1:]), "train")
    with pytest.raises(UserError, match="has no column 'answer'"):
        read_choices(write(tmp_path / "other.json", [{"instruction": "x", "output": "y"}]), "train")
    with pytest.raises(UserError, match="no such file"):
        read_choices(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("boolq", 9427, 3270),
        ("ARC-Easy", 2251, 2376),
        ("ARC-Challenge", 1119, 1172),
        ("openbookqa", 4957, 500),
        ("piqa", None, 1838),
        ("social_i_qa", None, 1954),
    ],
)
def test_every_row_of_the_published_sets_is_read(real_data: Path, name: str, train: int | None, test: int) -> None:
    for part, number in (("train", train), ("test", test)):
        if number is not None:
            found, counts = read_choices(real_data / "commonsense" / name / f"{part}.json", part)
            assert (len(found), counts) == (number, {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("the correct answer is answer2", "answer2"),
        ("Answer1. Not answer2", "answer1"),
        ("answer10", None),
        ("answer11 or answer2", "answer2"),
        ("", None),
    ],
)
def test_the_choice_that_is_named_first_counts(text: str, named: str | None) -> None:
    assert written_choice(text, ["answer1", "answer2"]) == named


def test_means_are_over_sets(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One question of boolq and three of piqa; what is written is right for boolq's and one of piqa's."""
    write(tmp_path / "boolq" / "test.json", [row("Is it?", "true", "true", "false")])
    rows = [row("How?", "solution1", "solution1", "solution2") for _ in range(3)]
    write(tmp_path / "piqa" / "test.json", rows)
    held_out, _ = read_choices(tmp_path, "test")

    def written(model: Any, tokenizer: Any, prompts: Any, most: int) -> list[str]:
        return ["true, I think"] if len(prompts) == 1 else ["solution1", "Solution2", "who knows"]

    monkeypatch.setattr(choices, "generate_answers", written)
    made = ChoiceTask(held_out, held_out, tiny_tokenizer, ModelSettings(), 128, {}, 0, 8)
    found = made.evaluate(tiny_llama).metrics
    assert list(found) == [*made.columns]
    assert found["accuracy written"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["answered"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["accuracy"] == (found["accuracy boolq"] + found["accuracy piqa"]) / 2
    whole = made._measured(tiny_llama, made._held_out)
    assert found["loss"] == pytest.approx(whole["loss"])
    silent = ChoiceTask(held_out[1:], held_out[1:], tiny_tokenizer, ModelSettings(), 128, {}, 0, None)
    assert silent.columns == ("accuracy", "loss")
    assert set(silent.evaluate_training(tiny_llama, 2, 0)) == {"accuracy", "loss"}
    with pytest.raises(UserError, match=r"data.tokens 128 leaves no room for a question in a context of 128"):
        ChoiceTask(held_out, held_out, tiny_tokenizer, ModelSettings(), 128, {}, 0, 128)
