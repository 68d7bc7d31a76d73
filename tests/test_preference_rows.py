from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.preferences.rows import PreferenceCollator, PreferenceRow, encode_preferences
from rankwise.tokenise import ANSWERS_TOO_LONG, PROMPTS_CUT, encode_completion, encode_prompt

ROW = {"prompt": "#!#!", "chosen": "?@", "rejected": ["@", "??"]}


def test_tokens_are_those_of_a_prompt_and_of_each_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [row], counts = encode_preferences([ROW], tiny_tokenizer, 32)
    assert row.prompt == encode_prompt(tiny_tokenizer, "#!#!", 32)
    assert row.answers == [encode_completion(tiny_tokenizer, text) for text in ("?@", "@", "??")]
    assert row.length == 5 + 3
    assert row.reference is None
    assert counts == {}


def test_what_is_cut_or_dropped_is_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """In 7 tokens: ``ROW`` loses one of its prompt; an answer of seven tokens fits no more."""
    rows = [
        ROW,
        {"prompt": "#", "chosen": "?", "rejected": ["@@@@@@"]},
        {"prompt": "#", "chosen": "?", "rejected": ["@"]},
    ]
    encoded, counts = encode_preferences(rows, tiny_tokenizer, 7)
    assert counts == {PROMPTS_CUT: 1, ANSWERS_TOO_LONG: 1}
    assert [row.length for row in encoded] == [7, 4]
    assert encoded[0].prompt == encode_prompt(tiny_tokenizer, "!#!", 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "preference row 2 has no chosen: each row needs prompt, chosen, rejected"),
        ({"chosen": ""}, "preference row 2 has no chosen"),
        ({"prompt": "", "rejected": []}, "preference row 2 has no prompt and no rejected"),
        ({"rejected": []}, "preference row 2 has no rejected"),
        ({"rejected": "one text"}, "preference row 2: rejected is a text, 'one text'; give a list of texts"),
    ],
)
def test_a_bad_row_is_named(tiny_tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_preferences([ROW, ROW | change], tiny_tokenizer, 32)


def test_a_missing_field_is_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="row 1 has no chosen and no rejected"):
        encode_preferences([{"prompt": "#"}], tiny_tokenizer, 32)


@pytest.mark.parametrize("rows", [[], [ROW]])
def test_no_row_is_left(tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=f"no preference row is left of {len(rows)}.*raise context above 4"):
        encode_preferences(rows, tiny_tokenizer, 4)


def test_a_batch_of_rows_with_different_numbers_of_answers() -> None:
    rows = [
        PreferenceRow([1, 2], [[5], [6, 7]], [-1.0, -2.0]),
        PreferenceRow([3], [[8], [9], [4, 4, 4]], [-3.0, -4.0, -5.0]),
    ]
    batch = PreferenceCollator(pad_token_id=0, multiple_of=1)(rows)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 5], [1, 2, 6, 7], [0, 0, 3, 8], [0, 0, 3, 9], [3, 4, 4, 4]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 5],
        [-100, -100, 6, 7],
        [-100, -100, -100, 8],
        [-100, -100, -100, 9],
        [-100, 4, 4, 4],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 2, 2, 4]
    assert batch["exists"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["reference"].tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]


def test_references_that_are_not_known_yet_are_zero() -> None:
    batch = PreferenceCollator(pad_token_id=0)([PreferenceRow([1], [[2], [3]])])
    assert torch.equal(batch["reference"], torch.zeros(1, 2))
