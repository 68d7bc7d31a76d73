"""From rows of texts or chats to tokens: a prompt with its chosen and rejected answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.chat_template import require_template
from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.preferences.chat import chat_texts
from rankwise.tokenise import PROMPTS_CUT, answer_ids, end_token, fit_prompt, token_ids

EQUAL_TO_CHOSEN = "rejected answers equal to the chosen one"
GIVEN_TWICE = "rejected answers that are given twice"


@dataclass
class PreferenceRow:
    """Token ids of one row.

    Attributes:
        prompt: ids of the prompt.
        answers: ids of the chosen answer, then of each rejected one.
        reference: log-probabilities of the answers under the reference, in nats, once they are known.
        texts: of the answers.
        weights: of the rejected answers in the loss; 1 each where not given.
        number: of the row among all of a trainer, from 1.
    """

    prompt: list[int]
    answers: list[list[int]]
    reference: list[float] | None = None
    texts: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    number: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def encode_preferences(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    rejected: str | None = "rejected",
    room: int = 0,
) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Tokenise rows of ``prompt``, ``chosen`` and ``rejected``, by TRL's conventions for their columns.

    - Texts: ``rejected`` is a list of texts of any length, or one text. The prompt is needed: a beginning that the
      answers share could end within a word.
    - Chat messages: see :func:`rankwise.preferences.chat.chat_texts`.

    Prompt and answers are tokenised apart, each different answer once (rows share its list of ids). A rejected answer
    whose tokens are those of the chosen one cannot be told from it and is dropped; one that is given twice is kept
    once. Both are counted, and so are prompts that were cut on the left. Other columns are not read.

    Args:
        rows: mappings; they may differ in form and in their number of rejected answers.
        tokenizer: its end-of-text token closes each answer, unless the answer's text has it already.
        context: most tokens of a prompt with its longest answer; a longer prompt is cut on the left.
        rejected: the column of the rejected answers; None where rows get them later.
        room: tokens of the longest answer that a row may get later.

    Returns:
        The encoded rows, one for each row given, and the counts that are not zero.

    Raises:
        UserError: there is no row, or the first row to have a mistake, by its number from 1: a field is missing or
            empty or neither text nor chat, no rejected answer is left, a prompt or an answer has no token, an answer
            does not fit the context, or a chat cannot be rendered. Nothing is tokenised before all rows were read.
    """
    end_token(tokenizer)
    read = [_read(row, number, tokenizer, rejected) for number, row in enumerate(rows, start=1)]
    if not read:
        raise UserError("no preference row is left: none was given")
    prompts = token_ids(tokenizer, [prompt for prompt, _ in read])
    texts = list(dict.fromkeys(answer for _, answers in read for answer in answers))
    ids_of = dict(zip(texts, answer_ids(tokenizer, texts), strict=True))
    counts: dict[str, int] = {}
    encoded: list[PreferenceRow] = []
    for number, (prompt, (_, answers)) in enumerate(zip(prompts, read, strict=True), start=1):
        with _row(number):
            kept = _distinct(answers, ids_of, counts)
            if rejected is not None and len(kept) == 1:
                raise UserError(
                    "has no rejected answer that differs from the chosen one: give one, or leave the row out"
                )
            ids = [ids_of[text] for text in kept]
            fitted = _prompt(tokenizer, prompt, max(room, *map(len, ids)), context, counts)
            encoded.append(PreferenceRow(fitted, ids, texts=kept))
    return encoded, counts


@contextlib.contextmanager
def _row(number: int) -> Iterator[None]:
    """Mistakes inside name the row."""
    try:
        yield
    except UserError as mistake:
        raise UserError(f"preference row {number} {mistake}") from None


def _read(
    row: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, rejected: str | None
) -> tuple[str, list[str]]:
    """The texts of a row: its prompt, and its answers, chosen first."""
    is_chat = isinstance(row.get("chosen"), list)
    row = {**row, "rejected": _rejected(row, rejected)}
    if is_chat:
        require_template(tokenizer, f"preference row {number}")
    with _row(number):
        needed = {"prompt": not is_chat, "chosen": True, "rejected": rejected is not None}
        missing = [name for name, is_needed in needed.items() if is_needed and not row.get(name)]
        if missing:
            listed = " and no ".join(missing).replace("rejected", rejected or "")
            raise UserError(
                f"has no {listed}: each row needs {', '.join(('prompt', 'chosen', rejected or '')).strip(', ')}"
            )
        return chat_texts(row, tokenizer) if is_chat else _plain_texts(row)


def _rejected(row: Mapping[str, Any], column: str | None) -> Any:
    """What stands in the column; of candidates the chosen answer is one by right."""
    if column is None:
        return []
    found = row.get(column)
    if column == "rejected" or not isinstance(found, list):
        return found
    return [answer for answer in found if answer != row.get("chosen")]


def _plain_texts(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    listed = rejected if isinstance(rejected, list) else [rejected]
    if not all(isinstance(text, str) for text in (prompt, chosen, *listed)):
        raise UserError(
            "holds something that is no text: prompt and chosen are texts, and rejected is one or a list of them"
        )
    if not all(listed):
        raise UserError(f"has an empty rejected answer, number {listed.index('') + 1}: leave it out")
    return prompt, [chosen, *listed]


def _distinct(texts: list[str], ids_of: Mapping[str, list[int]], counts: dict[str, int]) -> list[str]:
    """The chosen answer and the rejected ones whose tokens differ from its and from each other's, in their order."""
    short = [number for number, text in enumerate(texts) if len(ids_of[text]) < 2]
    if short:
        which = f"rejected answer, number {short[0]}," if short[0] else "chosen answer"
        raise UserError(f"has a {which} without a token of its own: leave it out")
    chosen, *rejected = texts
    wrong = [text for text in rejected if ids_of[text] != ids_of[chosen]]
    distinct: dict[tuple[int, ...], str] = {}
    for text in wrong:
        distinct.setdefault(tuple(ids_of[text]), text)
    count(counts, EQUAL_TO_CHOSEN, len(rejected) - len(wrong))
    count(counts, GIVEN_TWICE, len(wrong) - len(distinct))
    return [chosen, *distinct.values()]


def _prompt(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], longest: int, context: int, counts: dict[str, int]
) -> list[int]:
    """The prompt's ids such that the longest answer fits."""
    if not ids:
        raise UserError("has a prompt without a token: leave the row out")
    fitted = fit_prompt(tokenizer, ids, longest, context)
    if fitted is None:
        raise UserError(
            f"has a prompt of {len(ids)} tokens, of which nothing is left beside an answer of {longest}, end included,"
            f" in a context of {context}: allow a longer one, or leave the answer out"
        )
    count(counts, PROMPTS_CUT, int(fitted[1]))
    return fitted[0]
