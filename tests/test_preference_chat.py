from __future__ import annotations

import copy
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.preferences.rows import EQUAL_TO_CHOSEN, encode_preferences
from rankwise.tokenise import encode_completion, encode_prompt

# Three ways to end a message: a line, the end-of-text token, and that token with a line after it.
MESSAGE = (
    "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}END{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ENDS = {"line": "\n", "token": "<|endoftext|>", "token and line": "<|endoftext|>\n"}


def with_template(tokenizer: PreTrainedTokenizerFast, end: str = "line", begin: str = "") -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer)
    made.chat_template = begin + MESSAGE.replace("END", ENDS[end])
    return made


def asked(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]


def answered(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


ROW: dict[str, Any] = {"prompt": asked("#!"), "chosen": answered("?@"), "rejected": [answered("@"), answered("??")]}
WHOLE = {"chosen": asked("#!", "?@"), "rejected": [asked("#!", "@"), asked("#!", "??")]}


@pytest.mark.parametrize(("end", "left"), [("line", "\n"), ("token", ""), ("token and line", "")])
def test_an_answer_is_what_the_template_writes_after_the_prompt_and_ends_once(
    tiny_tokenizer: PreTrainedTokenizerFast, end: str, left: str
) -> None:
    tokenizer = with_template(tiny_tokenizer, end)
    [row], counts = encode_preferences([ROW], tokenizer, 64)
    assert row.prompt == encode_prompt(tokenizer, f"[user]#!{ENDS[end]}[assistant]", 64)
    assert row.answers == [encode_completion(tokenizer, text + left) for text in ("?@", "@", "??")]
    assert [answer.count(tokenizer.eos_token_id) for answer in row.answers] == [1, 1, 1]
    assert counts == {}


def test_a_begin_token_that_the_template_writes_is_not_doubled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = encode_preferences([ROW], with_template(tiny_tokenizer, begin="{{ bos_token }}"), 64)
    assert found == encode_preferences([ROW], with_template(tiny_tokenizer), 64)
    assert found[0][0].prompt[:2] != [tiny_tokenizer.bos_token_id] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": asked("Who?", "Me", "Why?"), "chosen": answered("So"), "rejected": answered("No")},
        {
            "prompt": [{"role": "system", "content": "Be."}, *asked("Who?")],
            "chosen": answered("A"),
            "rejected": answered("B"),
        },
        {"chosen": asked("Who?", "Me", "Why?", "So"), "rejected": asked("Who?", "Me", "Why?", "No")},
        {"chosen": asked("Who?", "Me", "Why?", "So"), "rejected": asked("Who?", "You")},
        {"chosen": asked("Who?", "Me"), "rejected": asked("Who?", "You", "Why?", "No")},
    ],
)
def test_pairs_are_rendered_as_trl_renders_them(tiny_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    tokenizer = with_template(tiny_tokenizer)
    explicit = row if "prompt" in row else trl.extract_prompt(row)
    theirs = trl.apply_chat_template(explicit, tokenizer)
    [found], _ = encode_preferences([row], tokenizer, 128)
    assert found.prompt == encode_prompt(tokenizer, theirs["prompt"], 128)
    assert found.answers == [encode_completion(tokenizer, theirs[name]) for name in ("chosen", "rejected")]


def test_whole_conversations_are_their_common_beginning_and_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer)
    expected = encode_preferences([ROW], tokenizer, 64)
    assert encode_preferences([WHOLE], tokenizer, 64) == expected
    assert encode_preferences([WHOLE | {"prompt": None}], tokenizer, 64) == expected
    longer = {"chosen": asked("#!", "?", "#", "@"), "rejected": [asked("#!", "?", "#", "!"), asked("#!", "!")]}
    [row], _ = encode_preferences([longer], tokenizer, 64)
    assert row.prompt == expected[0][0].prompt
    after = ("?\n[user]#\n[assistant]@\n", "?\n[user]#\n[assistant]!\n", "!\n")
    assert row.answers == [encode_completion(tokenizer, text) for text in after]


def test_a_conversation_equal_to_the_chosen_one_is_dropped(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer)
    row = WHOLE | {"rejected": [asked("#!", "?@"), asked("#!", "@"), asked("#!", "??")]}
    encoded, counts = encode_preferences([row], tokenizer, 64)
    assert encoded == encode_preferences([ROW], tokenizer, 64)[0]
    assert counts == {EQUAL_TO_CHOSEN: 1}
    with pytest.raises(UserError, match="preference row 1 has no rejected answer that differs"):
        encode_preferences([WHOLE | {"rejected": WHOLE["chosen"]}], tokenizer, 64)


@pytest.mark.parametrize("row", [ROW, WHOLE])
def test_chats_whose_rejected_answers_come_later(tiny_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    tokenizer = with_template(tiny_tokenizer)
    [full] = encode_preferences([ROW], tokenizer, 64)[0]
    [found], counts = encode_preferences([row], tokenizer, 64, rejected=None)
    assert (found.prompt, found.answers) == (full.prompt, full.answers[:1])
    assert counts == {}


def test_chats_and_texts_of_one_data_set(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer)
    text = {"prompt": "[user]#!\n[assistant]", "chosen": "?@\n", "rejected": ["@\n", "??\n"]}
    one, other, third = encode_preferences([ROW, text, WHOLE], tokenizer, 64)[0]
    assert one == other == third


def test_chats_of_the_datasets_library(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer)
    for row in (ROW, WHOLE):
        found = encode_preferences(Dataset.from_list([row]), tokenizer, 64)
        assert found == encode_preferences([ROW], tokenizer, 64)


MESSAGES = "holds an answer that is no list of messages: where chosen is a chat, rejected is one or a list of them"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"chosen": []}, "has no chosen"),
        (ROW | {"rejected": []}, "has no rejected"),
        (ROW | {"chosen": ["?@"]}, MESSAGES),
        (ROW | {"chosen": [{"role": "assistant"}]}, MESSAGES),
        (ROW | {"rejected": "@"}, MESSAGES),
        (ROW | {"rejected": ["@"]}, MESSAGES),
        (ROW | {"rejected": [answered("@"), []]}, MESSAGES),
        (ROW | {"rejected": [answered("@"), [{"role": "assistant", "content": None}]]}, MESSAGES),
        (ROW | {"prompt": "#!"}, "has chats for answers and a prompt that is no list of messages: give messages"),
        (ROW | {"prompt": None}, "has no prompt, and its conversations have no common beginning"),
        (ROW | {"chosen": answered(" ")}, "has an answer without content: leave it out"),
        (ROW | {"rejected": [answered("@"), answered("")]}, "has an answer without content"),
        (
            ROW | {"prompt": [{"role": "wizard", "content": "#"}]},
            "holds a chat that the chat template refuses: unknown role",
        ),
        (
            ROW | {"chosen": asked("?@")},
            r"has a prompt that the chat template writes otherwise .*\[assistant\]'\): use a",
        ),
    ],
)
def test_a_bad_row_is_named(tiny_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^preference row 2 {message}"):
        encode_preferences([ROW, row, ROW], with_template(tiny_tokenizer), 64)


def test_a_template_that_opens_an_answer_otherwise_than_it_writes_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("%}[assistant]{%", "%}[assistant]<think>{%")
    with pytest.raises(
        UserError, match="preference row 1 has a prompt that the chat template writes otherwise when an"
    ):
        encode_preferences([ROW], tokenizer, 64)


def test_chats_need_a_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UserError, match=r"^preference row 2 holds chats, and the tokenizer has no chat template; use a"
    ):
        encode_preferences([{"prompt": "#", "chosen": "?", "rejected": "@"}, ROW], tiny_tokenizer, 64)
