from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.preferences.rows import encode_preferences
from rankwise.tasks.instructions import alpaca_prompt, read_instructions
from rankwise.tokenise import encode_answers

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def turns(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[place % len(roles)], "content": content} for place, content in enumerate(contents)]


def test_pairs_under_any_column_names(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": "2+2?", "answer": 4}, {"question": "Who?", "answer": "Me"}])
    read = read_instructions(path, mapping={"prompt": "question", "completion": "answer"})
    assert read.form == "pairs"
    assert read.counts == {}
    assert read.rows == [{"prompt": "2+2?", "completion": "4"}, {"prompt": "Who?", "completion": "Me"}]


def test_a_template_words_the_prompt_and_braces_in_data_are_text(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "f{x} {prompt}", "completion": "y"}])
    read = read_instructions(path, template="Q: {prompt}\nA: ")
    assert read.rows == [{"prompt": "Q: f{x} {prompt}\nA: ", "completion": "y"}]


def test_alpaca_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add {a}.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Hum.", "output": "Mm"},
    ]
    read = read_instructions(written(tmp_path, rows))
    assert read.form == "alpaca"
    assert [row["completion"] for row in read.rows] == ["3", "La", "Mm"]
    assert read.rows[0]["prompt"] == alpaca_prompt("Add {a}.", "1 2")
    first, second = (row["prompt"] for row in read.rows[:2])
    assert first.index("Add {a}.") < first.index("1 2") < first.index("### Answer")
    assert "Material" in first
    assert "Material" not in second
    assert "Sing." in second


def test_alpaca_under_other_names(tmp_path: Path) -> None:
    path = written(tmp_path, [{"task": "Add.", "given": "1 2", "output": "3"}])
    read = read_instructions(path, mapping={"instruction": "task", "input": "given"})
    assert read.form == "alpaca"
    assert read.rows == [{"prompt": alpaca_prompt("Add.", "1 2"), "completion": "3"}]


def test_chat_of_several_turns_answers_the_last(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = written(tmp_path, [{"messages": [system, *turns("Hi", "Hello", "2+2?", "4")]}])
    read = read_instructions(path, tokenizer=chat_tokenizer)
    assert read.form == "chat"
    prompt = "[system]Be brief.\n[user]Hi\n[assistant]Hello\n[user]2+2?\n[assistant]"
    assert read.rows == [{"prompt": prompt, "completion": "4\n"}]
    assert read.counts == {}


def test_an_answer_is_joined_as_in_preference_training(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The mark that ends a turn, which need not be the end-of-text token, is learned."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("}}\n", "}}<end_of_turn>\n")
    chat = turns("Hi", "Hello", "2+2?", "4")
    read = read_instructions(written(tmp_path, [{"messages": chat}]), tokenizer=tokenizer)
    assert read.rows[0]["completion"] == "4<end_of_turn>\n"
    row = {"prompt": chat[:3], "chosen": chat[3:], "rejected": turns("5", roles=("assistant",))}
    [preference], _ = encode_preferences([row], tokenizer, 128)
    [supervised], _ = encode_answers(read.rows, tokenizer, 128)
    assert supervised["input_ids"] == preference.prompt + preference.answers[0]


def test_bad_chats_are_dropped_each_under_its_reason(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chats: list[Any] = [
        turns("Hi", "Hello", "Thanks"),  # goes on after its last answer: kept
        turns("Hi"),
        [],
        turns("Hello", "Hi", roles=("assistant", "user")),
        turns("Hi", " "),
        "text",
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        turns("Hi", "Hello", roles=("wizard", "assistant")),
    ]
    read = read_instructions(written(tmp_path, [{"messages": chat} for chat in chats]), tokenizer=chat_tokenizer)
    assert read.rows == [{"prompt": "[user]Hi\n[assistant]", "completion": "Hello\n"}]
    assert read.counts == {
        "rows without an answer": 3,
        "rows without a prompt": 1,
        "chats that are no list of role and content": 3,
        "chats that the chat template refuses, or whose prompt it writes otherwise before an answer": 1,
        "chats cut after their last answer": 1,
    }


def test_bad_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a"},
        {"prompt": "a", "completion": "\n"},
        {"prompt": "", "completion": "b"},
        {"prompt": None, "completion": None},
        7,
    ]
    read = read_instructions(written(tmp_path, rows))
    assert read.rows == [{"prompt": "a", "completion": "b"}]
    assert read.counts == {"unparsable rows": 1, "rows without an answer": 3, "rows without a prompt": 1}


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["prompt", "completion", "instruction", "output"], "pairs"),
        (["instruction", "input", "output", "answer"], "alpaca"),
        (["prompt", "messages"], "chat"),
    ],
)
def test_the_form_is_told_by_the_columns(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, columns: list[str], form: str
) -> None:
    row = {column: turns("Hi", "Hello") if column == "messages" else "x" for column in columns}
    assert read_instructions(written(tmp_path, [row]), tokenizer=chat_tokenizer).form == form


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "a", "answer": "b"}, {}, r"columns \(answer, question\) fit no form .* mapping"),
        ({"prompt": "a", "answer": "b"}, {"form": "pairs"}, "no column 'completion'"),
        (
            {"prompt": "a", "completion": "b"},
            {"form": "alpacca"},
            "unknown form 'alpacca'; did you mean 'alpaca'",
        ),
        (
            {"question": "a", "answer": "b"},
            {"mapping": {"prompt": "qestion", "completion": "answer"}},
            "no column 'qestion'; did you mean 'question'",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"mapping": {"promt": "prompt"}},
            "'promt'.* did you mean 'prompt'",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"form": "pairs", "mapping": {"instruction": "prompt"}},
            "which form 'pairs' has not",
        ),
        ({"instruction": "a", "output": "b"}, {"template": "{prompt}"}, "a template is for the form 'pairs'"),
        ({"prompt": "a", "completion": "b"}, {"template": "{promt}"}, r"has no \{prompt\}"),
        ({"prompt": "a", "completion": ""}, {}, "no row with both a prompt and an answer"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, {}, "no chat template"),
    ],
)
def test_bad_input(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_instructions(written(tmp_path, [row]), **options)


def test_chats_need_a_tokenizer_with_a_template(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = written(tmp_path, [{"messages": turns("Hi", "Hello")}])
    with pytest.raises(UserError, match="no chat template"):
        read_instructions(path, tokenizer=tiny_tokenizer)


def test_real_instructions(data_folder: Path) -> None:
    read = read_instructions(data_folder / "instruct" / "alpaca_subset.json")
    assert (len(read.rows), read.counts, read.form) == (2000, {}, "alpaca")
    mapping = {"prompt": "question", "completion": "answer"}
    for part, rows in (("train", 7473), ("test", 1319)):
        read = read_instructions(data_folder / "gsm8k" / f"{part}.jsonl", mapping=mapping)
        assert (len(read.rows), read.counts, read.form) == (rows, {}, "pairs")
