"""Maths problems from a file to the share that a model solves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.schema import ModelSettings
from rankwise.tasks import problems
from rankwise.tasks.problems import UNANSWERED, UNREADABLE, UNUSABLE, MathsTask, read_problems

TEMPLATE = "Q: {prompt}\nA: "
ROWS = [{"prompt": f"Q: {number}\nA: ", "completion": f"it is {number}\n#### {number}"} for number in range(6)]


def test_gsm8k_and_math_as_they_are_published(tmp_path: Path) -> None:
    """A table of question and answer; a folder of one problem a file, by subject."""
    table = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "1+1", "answer": "so #### 2"}, {"question": "", "answer": "#### 3"}, {"question": "x"}]
    rows.append({"question": "and?", "answer": "I do not know"})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, counts = read_problems(table, TEMPLATE)
    assert found == [{"prompt": "Q: 1+1\nA: ", "completion": "so #### 2"}]
    assert counts == {UNUSABLE: 2, UNANSWERED: 1}
    for number, subject in enumerate(("algebra", "geometry")):
        (tmp_path / "MATH" / subject).mkdir(parents=True)
        problem = {"problem": f"p{number}", "level": "Level 1", "type": subject, "solution": rf"\boxed{{{number}}}"}
        (tmp_path / "MATH" / subject / "1.json").write_text(json.dumps(problem, indent=4 * number or None))
    (tmp_path / "MATH" / "broken.json").write_text("{")
    found, counts = read_problems(tmp_path / "MATH", TEMPLATE)
    assert [row["completion"] for row in found] == [r"\boxed{0}", r"\boxed{1}"]
    assert counts == {UNREADABLE: 1}


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([{"questions": "1+1", "answer": "2"}], TEMPLATE, "neither question and answer nor problem and solution: did"),
        ([{"question": "1+1", "answer": "who knows"}], TEMPLATE, "no problem with a solution that ends with an answer"),
        ([{"question": "1+1", "answer": "2"}], "Q", "template 'Q' has no {prompt}"),
    ],
)
def test_a_file_without_problems_is_refused(tmp_path: Path, rows: Any, template: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        read_problems(tmp_path / "rows.json", template)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.json file"):
        read_problems(tmp_path, TEMPLATE)
    for name in ("1.json", "2.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=r"holds no problem: 2 files that cannot be read, first .*1\.json holds"):
        read_problems(tmp_path, TEMPLATE)


def task(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> MathsTask:
    given: dict[str, Any] = {"context": 96, "tokens": 24} | changes
    return MathsTask(ROWS[:4], ROWS[4:], tokenizer, ModelSettings(), counts={}, **given)


def test_solved_and_answered_are_counted_by_what_is_written(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two held-out problems (4 and 5) one is right, one has no answer; each of four training rows gets 1."""
    seen: list[Any] = []

    def written(model: Any, tokenizer: Any, prompts: Any, most: int) -> list[str]:
        seen.append([tokenizer.decode(ids) for ids in prompts])
        return ["I get 4.0", "who knows"] if len(prompts) == 2 else ["1"] * len(prompts)

    monkeypatch.setattr(problems, "generate_answers", written)
    made = task(tiny_tokenizer)
    found = made.evaluate(tiny_llama).metrics
    assert (found["accuracy"], found["answered"]) == (0.5, 0.5)
    assert [text.removeprefix("<|endoftext|>") for text in seen[0]] == [row["prompt"] for row in ROWS[4:]]
    training = made.evaluate_training(tiny_llama, 4, 0)
    assert (training["accuracy"], training["answered"]) == (0.25, 1.0)
    assert torch.tensor(training["loss"]).exp().item() == pytest.approx(training["perplexity"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 96}, "data.tokens 96 leaves no room for a problem in a context of 96"),
        ({"context": 12, "tokens": 2}, "no training solution fits the context of 12 tokens"),
    ],
)
def test_a_context_that_is_too_short_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, changes: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        task(tiny_tokenizer, **changes)


def test_what_does_not_fit_is_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "long " * 60, "completion": "#### 1"}, {"prompt": "Q", "completion": "so " * 80 + "#### 2"}]
    made = MathsTask([*ROWS, *rows], ROWS, tiny_tokenizer, ModelSettings(), context=64, counts={}, tokens=24)
    assert made.counts == {
        "training prompts cut to leave room for what is written": 1,
        "training prompts cut to the context": 1,
        "training answers longer than the context": 1,
    }
    assert len(made.sft_rows()) == 7
