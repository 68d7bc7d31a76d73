from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from rankwise import tokenise
from rankwise.errors import UserError
from rankwise.preferences import rows as rows_module
from rankwise.preferences.batches import BatchMaker, SequenceBatch, by_answer
from rankwise.preferences.rows import (
    EQUAL_TO_CHOSEN,
    GIVEN_TWICE,
    PreferenceRow,
    encode_preferences,
)
from rankwise.tokenise import PROMPTS_CUT, encode_answer_set, encode_completion, encode_prompt

ROW = {"prompt": "#!#!", "chosen": "?@", "rejected": ["@", "??"]}


@pytest.fixture(scope="module")
def deaf_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """It does not read "~", and takes "A" for "a"."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Replace("~", ""), normalizers.Lowercase()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def test_tokens_are_those_of_a_prompt_and_of_each_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [row], counts = encode_preferences([ROW], tiny_tokenizer, 32)
    assert row.prompt == encode_prompt(tiny_tokenizer, "#!#!", 32)
    assert row.answers == [encode_completion(tiny_tokenizer, text) for text in ("?@", "@", "??")]
    assert row.length == 5 + 3
    assert row.reference is None
    assert counts == {}


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
some_rows = st.lists(
    st.builds(
        lambda prompt, answers: {"prompt": prompt, "chosen": answers[0], "rejected": answers[1:]},
        texts,
        st.lists(texts, min_size=2, max_size=5, unique=True),
    ),
    min_size=1,
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(rows=some_rows, context=st.integers(52, 80))
def test_many_rows_have_the_tokens_that_each_alone_is_scored_with(
    tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], context: int
) -> None:
    encoded, counts = encode_preferences(rows, tiny_tokenizer, context)
    scored = [
        encode_answer_set(tiny_tokenizer, row["prompt"], [row["chosen"], *row["rejected"]], context) for row in rows
    ]
    assert [(row.prompt, row.answers) for row in encoded] == [made and made[:2] for made in scored]
    cut = sum(made[2] for made in scored if made)
    assert counts == ({PROMPTS_CUT: cut} if cut else {})


def test_batches_of_texts_keep_the_order(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "#" * count, "chosen": "?" * count, "rejected": ["@" * count]} for count in range(1, 6)]
    expected = encode_preferences(rows, tiny_tokenizer, 32)
    monkeypatch.setattr(tokenise, "BATCH", 2)
    assert encode_preferences(rows, tiny_tokenizer, 32) == expected
    assert [row.length for row in expected[0]] == [1 + 2 * count + 1 for count in range(1, 6)]


def test_an_answer_of_many_rows_is_tokenised_once(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def recorded(tokenizer: PreTrainedTokenizerFast, answers: list[str]) -> list[list[int]]:
        seen.extend(answers)
        return tokenise.answer_ids(tokenizer, answers)

    monkeypatch.setattr(rows_module, "answer_ids", recorded)
    encoded, _ = encode_preferences([ROW, ROW | {"chosen": "@", "rejected": ["?@"]}, ROW], tiny_tokenizer, 32)
    assert seen == ["?@", "@", "??"]
    assert encoded[1].answers == [encode_completion(tiny_tokenizer, text) for text in ("@", "?@")]


def test_one_rejected_text_is_a_pair(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pair, alike = (ROW | {"rejected": rejected} for rejected in ("@", ["@"]))
    assert encode_preferences([pair], tiny_tokenizer, 32) == encode_preferences([alike], tiny_tokenizer, 32)


def test_rows_of_the_datasets_library(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ROW, ROW | {"rejected": ["@"]}]
    assert encode_preferences(Dataset.from_list(rows), tiny_tokenizer, 32) == encode_preferences(
        rows, tiny_tokenizer, 32
    )


def test_prompts_that_are_cut_are_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """In 7 tokens: ``ROW`` loses one of its prompt, whose end and begin token stay; its answers are whole."""
    encoded, counts = encode_preferences([ROW, ROW | {"prompt": "#"}], tiny_tokenizer, 7)
    assert counts == {PROMPTS_CUT: 1}
    assert [row.length for row in encoded] == [7, 5]
    assert encoded[0].prompt == encode_prompt(tiny_tokenizer, "!#!", 7)
    assert encoded[0].answers == encoded[1].answers


def test_an_answer_that_does_not_fit_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Begin token, one token of the prompt, six of the answer and its end: nine."""
    row = {"prompt": "##", "chosen": "?", "rejected": ["@@@@@@"]}
    assert encode_preferences([row], tiny_tokenizer, 9)[0][0].length == 9
    message = (
        "preference row 2 has a prompt of 2 tokens, of which nothing is left beside an answer of 7, end included, in"
        " a context of 8: allow a longer one, or leave the answer out"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        encode_preferences([ROW, row], tiny_tokenizer, 8)


def test_rejected_answers_that_teach_nothing_are_dropped_and_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ROW, ROW | {"rejected": ["?@", "??", "@", "?@", "??", "@", "@"]}]
    encoded, counts = encode_preferences(rows, tiny_tokenizer, 32)
    assert [len(row.answers) for row in encoded] == [3, 3]
    assert encoded[1].answers == [encode_completion(tiny_tokenizer, text) for text in ("?@", "??", "@")]
    assert counts == {EQUAL_TO_CHOSEN: 2, GIVEN_TWICE: 3}


def test_answers_are_equal_by_their_tokens(deaf_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "#", "chosen": "a", "rejected": ["A", "b", "B", "~b"]}
    [encoded], counts = encode_preferences([row], deaf_tokenizer, 32)
    assert encoded.answers == [encode_completion(deaf_tokenizer, text) for text in "ab"]
    assert counts == {EQUAL_TO_CHOSEN: 1, GIVEN_TWICE: 2}


def test_an_end_token_that_an_answer_has_is_not_doubled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    closed = ROW | {"chosen": "?@<|endoftext|>"}
    [row], _ = encode_preferences([closed], tiny_tokenizer, 32)
    assert row.answers == encode_preferences([ROW], tiny_tokenizer, 32)[0][0].answers


def test_a_tokenizer_without_a_padding_or_a_begin_token_serves(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    [row], _ = encode_preferences([ROW], bare, 32)
    assert [bare.bos_token_id, *row.prompt] == [None, *encode_prompt(tiny_tokenizer, "#!#!", 32)[1:]]
    batch = BatchMaker(tokenise.padding_token(bare), trees=False)([row])
    sequence = [*row.prompt, *row.answers[1]]
    filling = [bare.eos_token_id] * (16 - len(sequence))
    assert batch.input_ids[1].tolist() == [*filling, *sequence]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "has no chosen: each row needs prompt, chosen, rejected"),
        ({"chosen": ""}, "has no chosen"),
        ({"prompt": "", "rejected": []}, "has no prompt and no rejected"),
        ({"rejected": []}, "has no rejected"),
        ({"rejected": ""}, "has no rejected"),
        ({"rejected": ["@", ""]}, "has an empty rejected answer, number 2: leave it out"),
        (
            {"rejected": 3},
            "holds something that is no text: prompt and chosen are texts, and rejected is one or a list",
        ),
        ({"rejected": ["@", 3]}, "holds something that is no text"),
        ({"prompt": ["#"]}, "holds something that is no text"),
        ({"rejected": ["?@", "?@"]}, "has no rejected answer that differs from the chosen one: give one"),
        ({"rejected": "?@"}, "has no rejected answer that differs from the chosen one"),
        ({"chosen": "~"}, "has a chosen answer without a token of its own: leave it out"),
        ({"rejected": ["@", "~~"]}, "has a rejected answer, number 2, without a token of its own"),
        ({"chosen": "<|endoftext|>"}, "has a chosen answer without a token of its own"),
        ({"prompt": "~"}, "has a prompt without a token: leave the row out"),
    ],
)
def test_a_bad_row_is_named(deaf_tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^preference row 2 {message}"):
        encode_preferences([ROW, ROW | change, ROW], deaf_tokenizer, 32)


def test_a_missing_field_is_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="row 1 has no chosen and no rejected"):
        encode_preferences([{"prompt": "#"}], tiny_tokenizer, 32)


def test_no_row_at_all(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no preference row is left: none was given"):
        encode_preferences([], tiny_tokenizer, 4)


def test_mistakes_are_named_before_anything_is_tokenised(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> list[list[int]]:
        raise AssertionError("tokenised")

    for name in ("answer_ids", "token_ids"):
        monkeypatch.setattr(rows_module, name, never)
    with pytest.raises(UserError, match="preference row 3 has no chosen"):
        encode_preferences([ROW, ROW, ROW | {"chosen": ""}], tiny_tokenizer, 32)
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_preferences([ROW], endless, 32)


def test_a_batch_of_rows_with_different_numbers_of_answers() -> None:
    rows = [
        PreferenceRow([1, 2], [[5], [6, 7]], [-1.0, -2.0]),
        PreferenceRow([3], [[8], [9], [4, 4, 4]], [-3.0, -4.0, -5.0]),
    ]
    batch = BatchMaker(0, trees=False)(rows)
    assert isinstance(batch, SequenceBatch)
    sequences = [[1, 2, 5], [1, 2, 6, 7], [3, 8], [3, 9], [3, 4, 4, 4]]
    assert batch.input_ids.tolist() == [[0] * (16 - len(ids)) + ids for ids in sequences]
    assert batch.labels[:, :-3].eq(-100).all()
    assert batch.labels[:, -3:].tolist() == [[-100, -100, 5], [-100, 6, 7], [-100, -100, 8], [-100, -100, 9], [4, 4, 4]]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 4, 2, 2, 4]
    assert batch.exists.tolist() == [[True, True, False], [True, True, True]]
    values = by_answer([row.reference for row in rows], 0.0)
    assert values.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]


def test_rejected_answers_of_another_column_or_none_at_all(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """With no rejected answers yet, the prompt leaves room for those that may come."""
    row = {"prompt": "#!#!", "chosen": "?", "candidates": ["@", "??", "?"]}
    [encoded], counts = encode_preferences([row], tiny_tokenizer, 32, rejected="candidates")
    assert encoded.texts == ["?", "@", "??"]
    assert counts == {}
    with pytest.raises(UserError, match=r"row 1 has no candidates: each row needs prompt, chosen, candidates$"):
        encode_preferences([ROW], tiny_tokenizer, 32, rejected="candidates")
    [encoded], counts = encode_preferences([row], tiny_tokenizer, 7, rejected=None, room=4)
    assert encoded.texts == ["?"]
    assert encoded.prompt == encode_prompt(tiny_tokenizer, "#!#!", 3)
    assert counts == {PROMPTS_CUT: 1}
