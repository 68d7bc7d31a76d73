"""Chats as the tokenizer's template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError

Chat = list[dict[str, Any]]


def is_chat(value: object) -> TypeGuard[Chat]:
    """Whether ``value`` is a list of messages, each with a ``role`` and a ``content`` that are texts."""
    return isinstance(value, list) and all(map(_is_message, value))


def require_template(tokenizer: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer, which must have a chat template.

    Raises:
        UserError: it has none; the message begins with ``what``, whose chats cannot be rendered.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"{what} holds chats, and the tokenizer has no chat template; use a model that has one")
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], *, answer_follows: bool = False) -> list[str]:
    """Each chat as text.

    Args:
        tokenizer: whose chat template is used.
        chats: one message or more in each.
        answer_follows: whether the text ends where the assistant's next answer begins.

    Raises:
        UserError: the template refuses a chat.
    """
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            list(chats), tokenize=False, add_generation_prompt=answer_follows
        )
    except TemplateError as refusal:
        raise UserError(f"holds a chat that the chat template refuses: {refusal}") from None
    return texts


def render_answers(tokenizer: PreTrainedTokenizerBase, prompt: Chat, answers: Sequence[Chat]) -> tuple[str, list[str]]:
    """A prompt with several answers to it, each as what follows the prompt's text where it is written with the answer.

    The prompt is rendered up to where the assistant's answer begins, then with each answer: the marks with which the
    template closes an answer are the answer's. White space after a closing end-of-text token, which a model never
    writes, is left out.

    Args:
        tokenizer: with a chat template and an end-of-text token.
        prompt: one message or more.
        answers: one message or more in each.

    Returns:
        The prompt's text, and those of the answers.

    Raises:
        UserError: the template refuses the messages, or it writes the prompt otherwise where an answer follows.
    """
    [opened] = render(tokenizer, [prompt], answer_follows=True)
    whole = render(tokenizer, [prompt + answer for answer in answers])
    if not all(text.startswith(opened) for text in whole):
        raise UserError(
            f"has a prompt that the chat template writes otherwise when an answer follows (alone it ends"
            f" {opened[-40:]!r}): use a template that writes it the same way in both"
        )
    return opened, [_closed(text[len(opened) :], tokenizer.eos_token) for text in whole]


def _closed(text: str, end: str) -> str:
    stripped = text.rstrip()
    return stripped if stripped.endswith(end) else text


def _is_message(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
