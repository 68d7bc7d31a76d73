"""Instructions: rows of a prompt and its completion, from two columns, Alpaca's form, or chats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from transformers import PreTrainedTokenizerBase

from rankwise.chat_template import is_chat, render_answers, require_template
from rankwise.counting import count
from rankwise.errors import UserError, nearest
from rankwise.tasks.tables import TableOptions, as_text, columns_of, read_rows, require_columns

Pair = dict[str, str]
# In the order in which `auto` looks for them. Alpaca's `input` may be missing altogether.
NEEDED = {"pairs": ("prompt", "completion"), "alpaca": ("instruction", "output"), "chat": ("messages",)}
OPTIONAL = {"pairs": (), "alpaca": ("input",), "chat": ()}
ALPACA_PROMPT = "### Task\n{instruction}\n\n### Answer\n"
ALPACA_PROMPT_WITH_INPUT = "### Task\n{instruction}\n\n### Material\n{input}\n\n### Answer\n"
FORM_READ = "rows of the form "  # and the form, in the counts of a run
NO_PROMPT = "rows without a prompt"
NO_ANSWER = "rows without an answer"
NO_CHAT = "chats that are no list of role and content"
REFUSED = "chats that the chat template refuses, or whose prompt it writes otherwise before an answer"
AFTER_ANSWER = "chats cut after their last answer"


class Instructions(NamedTuple):
    """What was read: rows of ``prompt`` and ``completion``, what was dropped, and which form the file has."""

    rows: list[Pair]
    counts: dict[str, int]
    form: str


def read_instructions(
    path: Path,
    *,
    form: str = "auto",
    mapping: Mapping[str, str] | None = None,
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **table: Unpack[TableOptions],
) -> Instructions:
    """Read prompts and completions; rows without either are dropped and counted.

    - ``pairs``: columns ``prompt`` and ``completion``, under any name through ``mapping``, for example
      ``{"prompt": "question", "completion": "answer"}``.
    - ``alpaca``: columns ``instruction``, ``output`` and, where there is one, ``input``, set into our short
      template.
    - ``chat``: a column ``messages``, each a list of ``{"role", "content"}``. The last message of the
      assistant, as the tokenizer's chat template writes and closes it, is the completion and all before it the
      prompt: of a chat with several turns only the last answer is trained on. Messages after it are ignored and
      their chats counted.
    - ``auto``: the first of these whose columns are all there; the result says which.

    Args:
        path: a table (see `read_rows`).
        form: ``auto``, ``pairs``, ``alpaca`` or ``chat``.
        mapping: from the column names above to those of the file.
        template: for ``pairs``, the prompt's wording, with ``{prompt}`` where the column's text goes; as it
            is by default.
        tokenizer: for ``chat``, whose chat template is used.
        **table: how a delimited file is written.

    Raises:
        UserError: the file cannot be read, its columns fit no form, an option does not fit, or no row is
            usable.
    """
    _check_options(form, mapping, template)
    rows, counts = read_rows(path, **table)
    names = mapping or {}
    require_columns(path, rows, names.values())
    chosen = _detect(path, rows, names) if form == "auto" else form
    require_columns(path, rows, [names.get(name, name) for name in NEEDED[chosen]])
    if template is not None and chosen != "pairs":
        raise UserError(f"{path}: a template is for the form 'pairs'; this file is read as {chosen!r}")
    pairs = list(_pairs(path, chosen, rows, names, template, tokenizer))
    kept = _usable(pairs, counts)
    if chosen == "chat":
        chats = (row.get(names.get("messages", "messages")) for row in rows)
        cut = (isinstance(pair, dict) and _goes_on(chat) for pair, chat in zip(pairs, chats, strict=True))
        count(counts, AFTER_ANSWER, sum(cut))
    if not kept:
        raise UserError(f"{path} holds no row with both a prompt and an answer (read as {chosen!r}: {counts})")
    return Instructions(kept, counts, chosen)


def alpaca_prompt(instruction: str, material: str = "") -> str:
    """The wording of an instruction with or without the material that it is about."""
    if not instruction:
        return ""
    if material:
        return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=material)
    return ALPACA_PROMPT.format(instruction=instruction)


def chat_pair(messages: object, tokenizer: PreTrainedTokenizerBase) -> Pair | str:
    """A chat as the prompt before its last answer and that answer, or the reason why it cannot be one."""
    if not is_chat(messages):
        return NO_CHAT
    last = _last_answer(messages)
    if last is None or not messages[last]["content"].strip():
        return NO_ANSWER
    if last == 0:
        return NO_PROMPT
    try:
        prompt, [completion] = render_answers(tokenizer, messages[:last], [messages[last : last + 1]])
    except UserError:
        return REFUSED
    return _pair(prompt, completion)


def _pair(prompt: str, completion: str) -> Pair | str:
    if not completion:
        return NO_ANSWER
    return {"prompt": prompt, "completion": completion} if prompt else NO_PROMPT


def _last_answer(messages: Sequence[Mapping[str, str]]) -> int | None:
    answers = [position for position, turn in enumerate(messages) if turn["role"] == "assistant"]
    return answers[-1] if answers else None


def _goes_on(messages: Any) -> bool:
    return bool(messages[-1]["role"] != "assistant")


def _check_options(form: str, mapping: Mapping[str, str] | None, template: str | None) -> None:
    if form != "auto" and form not in NEEDED:
        raise UserError(f"unknown form {form!r}; {nearest(form, ['auto', *NEEDED])}")
    forms = list(NEEDED) if form == "auto" else [form]
    known = [name for each in forms for name in (*NEEDED[each], *OPTIONAL[each])]
    for name in mapping or {}:
        if name not in known:
            raise UserError(f"mapping names the column {name!r}, which form {form!r} has not; {nearest(name, known)}")
    if template is not None and "{prompt}" not in template:
        raise UserError(f"template {template!r} has no {{prompt}}, where the prompt's text goes")


def _detect(path: Path, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    present = columns_of(rows)
    fitting = [form for form, needed in NEEDED.items() if all(names.get(name, name) in present for name in needed)]
    # A mapping says what is meant, so a form that has nothing of it is not the one.
    meant = [form for form in fitting if set(names) <= {*NEEDED[form], *OPTIONAL[form]}]
    if not meant:
        forms = "; ".join(f"{form}: {', '.join(needed)}" for form, needed in NEEDED.items())
        found = ", ".join(sorted(present))
        raise UserError(f"{path}: the columns ({found}) fit no form ({forms}); name them in a mapping")
    return meant[0]


def _pairs(
    path: Path,
    form: str,
    rows: Iterable[Mapping[str, Any]],
    names: Mapping[str, str],
    template: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Pair | str]:
    if form == "chat":
        with_template = require_template(tokenizer, str(path))
        column = names.get("messages", "messages")
        return (chat_pair(row.get(column), with_template) for row in rows)
    keys = (*NEEDED[form], *OPTIONAL[form])
    cells = ({key: as_text(row.get(names.get(key, key))) for key in keys} for row in rows)
    if form == "alpaca":
        return (_pair(alpaca_prompt(cell["instruction"], cell["input"]), cell["output"]) for cell in cells)
    return (_pair(_worded(cell["prompt"], template), cell["completion"]) for cell in cells)


def _worded(prompt: str, template: str | None) -> str:
    return template.replace("{prompt}", prompt) if template and prompt else prompt


def _usable(pairs: Iterable[Pair | str], counts: dict[str, int]) -> list[Pair]:
    usable = []
    for pair in pairs:
        if isinstance(pair, str):
            count(counts, pair)
        else:
            usable.append(pair)
    return usable
