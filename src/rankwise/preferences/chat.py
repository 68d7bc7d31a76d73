"""Preference rows of chat messages, as texts: what the chat template writes, and where in it the answers begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.chat_template import Chat, is_chat, render_answers
from rankwise.errors import UserError


def chat_texts(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Render a row of chats, as :func:`rankwise.chat_template.render_answers` does.

    Args:
        row: ``chosen``, one list of messages; ``rejected``, one or a list of such; and ``prompt``, a list of messages.
            Without a prompt the answers are whole conversations, and their longest common beginning is the prompt.
        tokenizer: with a chat template and an end-of-text token.

    Returns:
        The prompt's text, and those of the answers, chosen first.

    Raises:
        UserError: messages are not as above, the template refuses them, or it writes the prompt otherwise where an
            answer follows.
    """
    prompt, answers = _messages(row)
    if not all(any(turn["content"].strip() for turn in answer) for answer in answers):
        raise UserError("has an answer without content: leave it out")
    return render_answers(tokenizer, prompt, answers)


def _messages(row: Mapping[str, Any]) -> tuple[Chat, list[Chat]]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    listed = rejected if isinstance(rejected, list) else [rejected]
    answers = [chosen, *([listed] if listed and is_chat(listed) else listed)]
    if not all(answer and is_chat(answer) for answer in answers):
        raise UserError(
            "holds an answer that is no list of messages: where chosen is a chat, rejected is one or a list of them,"
            " and a message has a role and a content that are texts"
        )
    if not prompt:
        return _split(answers)
    if not is_chat(prompt):
        raise UserError(
            "has chats for answers and a prompt that is no list of messages: give messages, or leave the prompt out"
            " where the answers are whole conversations"
        )
    return prompt, answers


def _split(whole: Sequence[Chat]) -> tuple[Chat, list[Chat]]:
    """Whole conversations as their common beginning and what follows, at least one message each."""
    common, most = 0, min(map(len, whole)) - 1
    while common < most and all(chat[common] == whole[0][common] for chat in whole):
        common += 1
    if not common:
        raise UserError("has no prompt, and its conversations have no common beginning, which would be the prompt")
    return whole[0][:common], [chat[common:] for chat in whole]
