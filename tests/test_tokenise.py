from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.likelihood import answer_log_probabilities
from rankwise.tokenise import (
    ANSWERS_TOO_LONG,
    PROMPTS_CUT,
    AnswerCollator,
    encode_answer,
    encode_answer_set,
    encode_answers,
    encode_completion,
    encode_prompt,
    pad_left,
)

# One token a character: nothing here merges in the tiny tokenizer's vocabulary.
PROMPT, ANSWER = "#!#!#!", "?@"


@pytest.fixture(scope="module")
def without_begin(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def characters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.backend_tokenizer.encode(character).ids[0] for character in text]


def test_prompt_and_answer_by_hand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The begin token, six of the prompt, two of the answer, the end: the last three have loss."""
    end = tiny_tokenizer.eos_token_id
    row = encode_answer(tiny_tokenizer, PROMPT, ANSWER, 10)
    assert row is not None
    answer = [*characters(tiny_tokenizer, ANSWER), end]
    assert row.input_ids == [end, *characters(tiny_tokenizer, PROMPT), *answer]
    assert row.labels == [-100] * 7 + answer
    assert not row.prompt_cut


def test_tokenised_apart_even_where_the_whole_would_merge(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tiny_tokenizer("river")["input_ids"]
    row = encode_answer(tiny_tokenizer, "ri", "ver", 50)
    assert row is not None
    apart = [*tiny_tokenizer("ri")["input_ids"], *tiny_tokenizer("ver")["input_ids"]]
    assert apart != whole
    assert row.input_ids[1:-1] == apart


@pytest.mark.parametrize(
    ("context", "prompt"), [(10, PROMPT), (9, PROMPT[1:]), (6, PROMPT[-2:]), (5, PROMPT[-1:]), (4, None)]
)
def test_the_prompt_is_cut_from_the_left_and_keeps_its_begin_token(
    tiny_tokenizer: PreTrainedTokenizerFast, context: int, prompt: str | None
) -> None:
    row = encode_answer(tiny_tokenizer, PROMPT, ANSWER, context)
    if prompt is None:
        assert row is None
        return
    assert row is not None
    begin = tiny_tokenizer.bos_token_id
    assert row.input_ids[:-3] == [begin, *characters(tiny_tokenizer, prompt)]
    assert row.prompt_cut == (prompt != PROMPT)
    assert len(row.labels) == len(row.input_ids) <= context


@pytest.mark.parametrize(("context", "prompt"), [(9, PROMPT), (8, PROMPT[1:]), (4, PROMPT[-1:]), (3, None)])
def test_without_a_begin_token(without_begin: PreTrainedTokenizerFast, context: int, prompt: str | None) -> None:
    row = encode_answer(without_begin, PROMPT, ANSWER, context)
    kept = None if row is None else row.input_ids[:-3]
    assert kept == (None if prompt is None else characters(without_begin, prompt))


def test_an_empty_prompt_is_the_begin_token_or_an_error(
    tiny_tokenizer: PreTrainedTokenizerFast, without_begin: PreTrainedTokenizerFast
) -> None:
    row = encode_answer(tiny_tokenizer, "", ANSWER, 4)
    assert row is not None
    assert row.labels[0] == -100
    assert encode_answer(tiny_tokenizer, "", ANSWER, 3) is None
    with pytest.raises(UserError, match="needs a tokenizer with a beginning-of-text"):
        encode_answer(without_begin, "", ANSWER, 9)


def test_a_begin_token_that_the_prompt_has_is_not_doubled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tiny_tokenizer, "<|endoftext|>#", 9) == encode_prompt(tiny_tokenizer, "#", 9)


def test_prompt_alone(tiny_tokenizer: PreTrainedTokenizerFast, without_begin: PreTrainedTokenizerFast) -> None:
    begin, ids = tiny_tokenizer.bos_token_id, characters(tiny_tokenizer, PROMPT)
    assert encode_prompt(tiny_tokenizer, PROMPT, 7) == [begin, *ids]
    assert encode_prompt(tiny_tokenizer, PROMPT, 3) == [begin, *ids[-2:]]
    assert encode_prompt(tiny_tokenizer, PROMPT, 1) == [begin]
    assert encode_prompt(without_begin, PROMPT, 1) == ids[-1:]
    with pytest.raises(UserError, match="at least one token, not 0"):
        encode_prompt(tiny_tokenizer, PROMPT, 0)


def test_completion_ends_and_a_tokenizer_without_an_end_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert encode_completion(tiny_tokenizer, "") == [tiny_tokenizer.eos_token_id]
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_completion(endless, "a")


def test_an_end_token_that_an_answer_has_is_not_doubled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    closed = ANSWER + "<|endoftext|>"
    assert encode_completion(tiny_tokenizer, closed) == encode_completion(tiny_tokenizer, ANSWER)
    assert encode_answer(tiny_tokenizer, PROMPT, closed, 20) == encode_answer(tiny_tokenizer, PROMPT, ANSWER, 20)
    texts = [closed, ANSWER]
    shared = encode_answer_set(tiny_tokenizer, PROMPT, texts, 20)
    assert shared is not None and shared[1] == [encode_completion(tiny_tokenizer, ANSWER)] * 2
    encoded, _ = encode_answers([{"prompt": PROMPT, "completion": text} for text in texts], tiny_tokenizer, 20)
    assert encoded[0] == encoded[1]


def test_tokens_that_a_tokenizer_adds_by_itself_are_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert adding("#")["input_ids"][0] == 0
    assert encode_answer(adding, PROMPT, ANSWER, 20) == encode_answer(tiny_tokenizer, PROMPT, ANSWER, 20)


def test_many_rows_with_counts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "#", "completion": "?"},
        {"prompt": PROMPT, "completion": "?"},
        {"prompt": "#", "completion": "?" * 9},
    ]
    encoded, counts = encode_answers(rows, tiny_tokenizer, 6)
    assert counts == {PROMPTS_CUT: 1, ANSWERS_TOO_LONG: 1}
    assert [len(row["input_ids"]) for row in encoded] == [4, 6]


def test_no_row_left_and_no_row_given(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no answer fits the context of 4 tokens: all 1"):
        encode_answers([{"prompt": "#", "completion": "?????"}], tiny_tokenizer, 4)
    assert encode_answers([], tiny_tokenizer, 4) == ([], {})


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(prompt=texts, completion=texts, context=st.integers(3, 60))
def test_what_always_holds(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, context: int) -> None:
    answer = encode_completion(tiny_tokenizer, completion)
    row = encode_answer(tiny_tokenizer, prompt, completion, context)
    if row is None:
        assert len(answer) + 2 > context
        return
    assert row.input_ids == encode_prompt(tiny_tokenizer, prompt, context - len(answer)) + answer
    assert [label for label in row.labels if label != -100] == answer
    assert len(row.input_ids) <= context
    assert encode_answers([{"prompt": prompt, "completion": completion}], tiny_tokenizer, context)[0] == [
        row.features()
    ]


def test_several_answers_share_a_prompt_that_leaves_room_for_the_longest(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["?", ANSWER + "?"]
    answers = [encode_completion(tiny_tokenizer, text) for text in texts]
    for context in (30, 11, 8, 6):
        shared = encode_answer_set(tiny_tokenizer, PROMPT, texts, context)
        prompt = encode_prompt(tiny_tokenizer, PROMPT, context - 4)
        assert shared == (prompt, answers, context < 11)
    assert encode_answer_set(tiny_tokenizer, PROMPT, texts, 5) is None


def test_an_answer_set_of_one_is_an_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for context in (10, 9, 6, 5, 4):
        row = encode_answer(tiny_tokenizer, PROMPT, ANSWER, context)
        shared = encode_answer_set(tiny_tokenizer, PROMPT, [ANSWER], context)
        assert (row is None) == (shared is None) == (context == 4)
        if row is not None and shared is not None:
            prompt, [answer], was_cut = shared
            assert (prompt + answer, was_cut) == (row.input_ids, row.prompt_cut)


def test_padding_on_the_left_aligns_the_ends() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = AnswerCollator(pad_id=9, multiple_of=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_lengths_are_rounded_up_so_that_few_shapes_occur() -> None:
    batch = AnswerCollator(pad_id=9)([{"input_ids": [5] * 17, "labels": [5] * 17}])
    assert batch["input_ids"].tolist() == [[9] * 15 + [5] * 17]
    assert batch["attention_mask"].sum() == 17


def test_rows_become_one_tensor_with_a_mask_of_their_own_tokens() -> None:
    ids, own = pad_left([[5, 6, 7], [], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [9, 9, 8]]
    assert own.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert ids.dtype == own.dtype == torch.int64


def test_a_first_token_is_never_predicted_from_padding(tiny_llama: LlamaForCausalLM) -> None:
    """Rows with a label on each token: the loss of the short one is that of its second and third token alone."""
    rows = [{"input_ids": row, "labels": row} for row in ([11, 12, 13, 14, 15, 16], [21, 22, 23])]
    batch = AnswerCollator(pad_id=1, multiple_of=1)(rows)
    assert batch["labels"].tolist() == [[-100, 12, 13, 14, 15, 16], [-100] * 4 + [22, 23]]
    with torch.no_grad():
        values, mask = answer_log_probabilities(tiny_llama, batch)
        logits = tiny_llama(input_ids=torch.tensor([[21, 22, 23]])).logits[0]
    assert mask.sum(dim=1).tolist() == [5, 2]
    expected = logits.log_softmax(-1)[[0, 1], [22, 23]]
    torch.testing.assert_close(values[1][mask[1]], expected, atol=1e-5, rtol=0)


def test_padding_token_of_a_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert AnswerCollator.of(tiny_tokenizer).pad_id == tiny_tokenizer.pad_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert AnswerCollator.of(bare) == AnswerCollator(bare.eos_token_id)
