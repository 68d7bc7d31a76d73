"""The only place where rows become token ids: training and evaluation must cut prompt and answer alike.

Prompt and answer are tokenised apart. Tokenised as one text, a token can straddle the boundary, and then the
answer that is scored is not the answer that is trained or generated.

The rule, for every model and task: a prompt begins with the beginning-of-text token where the tokenizer has
one, an answer ends with the end-of-text token (each once, if the text, say by a chat template, has it already);
nothing else is added. Special tokens written out in a text, as chat templates do, are read as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError

IGNORED = -100
BATCH = 1000  # texts of one call: a tokenizer keeps far more than the ids until the call returns
PROMPTS_CUT = "prompts cut to the context"
CUT_TO_WRITE = "prompts cut to leave room for what is written"
ANSWERS_TOO_LONG = "answers longer than the context"


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A prompt and its answer as ids; ``labels`` are the same ids with -100 over the prompt."""

    input_ids: list[int]
    labels: list[int]
    prompt_cut: bool

    def features(self) -> dict[str, list[int]]:
        """The row as a trainer wants it."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, room: int) -> list[int]:
    """The ids of a prompt in at most ``room`` tokens: begin token (if any), then the end of the prompt.

    Raises:
        UserError: ``room`` is below one, or the prompt gives no token at all.
    """
    return _fit(_open(tokenizer, token_ids(tokenizer, [prompt])[0]), tokenizer, room)


def fit_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], room: int) -> tuple[list[list[int]], int]:
    """The ids of prompts as :func:`encode_prompt` gives them, and how many were cut.

    Raises:
        UserError: as :func:`encode_prompt`.
    """
    opened = [_open(tokenizer, ids) for ids in token_ids(tokenizer, prompts)]
    return [_fit(ids, tokenizer, room) for ids in opened], sum(len(ids) > room for ids in opened)


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str) -> list[int]:
    """The ids of an answer, closed by the end-of-text token.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    return answer_ids(tokenizer, [completion])[0]


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, context: int) -> EncodedRow | None:
    """A prompt and its answer within ``context`` tokens, or None where the answer is too long.

    Where both do not fit, the prompt is cut from the left; the begin token stays. The answer is never cut: it
    must leave room for one token of the prompt's own beside the begin token.

    Args:
        tokenizer: the model's tokenizer, with an end-of-text token.
        prompt: the text that is given; without loss.
        completion: the text that is to be answered; with loss, as is the end-of-text token after it.
        context: the largest number of tokens in the row.

    Raises:
        UserError: the prompt gives no token at all, or the tokenizer has no end-of-text token.
    """
    prompt_ids = token_ids(tokenizer, [prompt])[0]
    return _join(tokenizer, prompt_ids, encode_completion(tokenizer, completion), context)


def encode_answer_set(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str], context: int, least_room: int = 0
) -> tuple[list[int], list[list[int]], bool] | None:
    """A prompt and several answers to it, such that the longest fits ``context`` tokens with the prompt.

    The prompt leaves room for ``least_room`` tokens at least, however short the answers are.

    Returns:
        The prompt's ids, each answer's ids, and whether the prompt was cut on the left; None where an answer is too
        long for the context.

    Raises:
        UserError: as :func:`encode_answer`.
    """
    prompt_ids, *texts = token_ids(tokenizer, [prompt, *completions])
    answers = _closed(tokenizer, texts)
    longest = max(map(len, answers))
    fitted = fit_prompt(tokenizer, prompt_ids, longest, context - max(0, least_room - longest))
    return None if fitted is None else (fitted[0], answers, fitted[1])


def encode_answers(
    rows: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Encode rows of ``prompt`` and ``completion`` as `encode_answer` does.

    Returns:
        Rows of ``input_ids`` and ``labels``, and the counts of prompts that were cut and of rows that were
        dropped because the answer is longer than the context.

    Raises:
        UserError: as `encode_answer`, or no row is left.
    """
    listed = list(rows)
    prompts = token_ids(tokenizer, [row["prompt"] for row in listed])
    answers = answer_ids(tokenizer, [row["completion"] for row in listed])
    encoded: list[dict[str, list[int]]] = []
    counts: dict[str, int] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        row = _join(tokenizer, prompt, answer, context)
        count(counts, ANSWERS_TOO_LONG, int(row is None))
        if row is not None:
            count(counts, PROMPTS_CUT, int(row.prompt_cut))
            encoded.append(row.features())
    if listed and not encoded:
        raise UserError(f"no answer fits the context of {context} tokens: all {len(listed)} are longer")
    return encoded, counts


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, with nothing added."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        # verbose=False: the tokenizer warns of texts beyond the context, which are cut and counted here.
        batch = list(texts[start : start + BATCH])
        ids += tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each answer, closed by the end-of-text token.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    return _closed(tokenizer, token_ids(tokenizer, texts))


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], answer: int, context: int
) -> tuple[list[int], bool] | None:
    """A prompt's ids with the begin token, cut on the left such that ``answer`` more tokens fit ``context``.

    Returns:
        The ids, and whether they were cut; None where the answer is too long for the context.

    Raises:
        UserError: the prompt has no token at all.
    """
    opened = _open(tokenizer, ids)
    least = 1 if tokenizer.bos_token_id is None else 2
    room = context - answer
    if room < min(least, len(opened)):
        return None
    kept = _fit(opened, tokenizer, room)
    return kept, len(kept) < len(opened)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-text token, without which a model cannot learn to stop."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("the tokenizer has no end-of-text token; set its eos_token")
    return end


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the tokenizer's own, else its end-of-text token (masked either way)."""
    padding = tokenizer.pad_token_id
    return padding if isinstance(padding, int) else end_token(tokenizer)


@dataclass(frozen=True)
class AnswerCollator:
    """Pads rows on the left to about the longest of the batch, so that the answers share the rows' end.

    Attributes:
        pad_id: fills ``input_ids``; ``labels`` are filled with -100 and ``attention_mask`` with 0.
        multiple_of: the length is rounded up to a multiple of this many tokens, so that few shapes occur: kernels are
            made for a shape, and oneDNN's for bfloat16 stay in memory (docs/log.md).
    """

    pad_id: int
    multiple_of: int = 16

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> AnswerCollator:
        """A collator that pads as the tokenizer does."""
        return cls(padding_token(tokenizer))

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Rows of ``input_ids`` and ``labels`` as int64 tensors of one shape, with their attention mask."""
        longest = max(len(row["input_ids"]) for row in features)
        width = -(-longest // self.multiple_of) * self.multiple_of
        input_ids, attention_mask = pad_left([row["input_ids"] for row in features], self.pad_id, width)
        # A row's first token has nothing before it: padding on the left must not become what it is predicted from.
        labels, _ = pad_left([[IGNORED, *row["labels"][1:]] for row in features], IGNORED, width)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_left(
    rows: Sequence[Sequence[int]], filling: int, width: int | None = None
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Rows as one int64 tensor, filled on the left, and a mask that is 1 at their own tokens.

    The length is that of the longest row, or ``width`` where it is given.
    """
    width = width or max(map(len, rows))
    ids = torch.tensor([[filling] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, own


def _open(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    begin = tokenizer.bos_token_id
    opened = ids if begin is None or ids[:1] == [begin] else [begin, *ids]
    if not opened:
        raise UserError("a prompt without a token needs a tokenizer with a beginning-of-text token (bos_token)")
    return opened


def _fit(ids: list[int], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    if room < 1:
        raise UserError(f"a prompt needs room for at least one token, not {room}")
    if len(ids) <= room:
        return ids
    begun = [] if tokenizer.bos_token_id is None else ids[:1]
    return begun + ids[len(ids) - room + len(begun) :]


def _closed(tokenizer: PreTrainedTokenizerBase, answers: Iterable[list[int]]) -> list[list[int]]:
    end = end_token(tokenizer)
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in answers]


def _join(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int], context: int
) -> EncodedRow | None:
    fitted = fit_prompt(tokenizer, prompt, len(completion), context)
    if fitted is None:
        return None
    kept, was_cut = fitted
    return EncodedRow(kept + completion, [IGNORED] * len(kept) + completion, was_cut)
