"""A prompt template as a chat: what the user asks, and what the assistant answers."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rankwise.chat_template import Chat, render_answers, require_template
from rankwise.errors import UserError
from rankwise.recommend.prompts import Template

_ASKED, _ANSWERED = "(what the user asks)", "(what the assistant says)"


def as_chat(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with its prompt as a user's message and its answer as the assistant's, as the model writes chats.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not write messages as they are.
    """
    require_template(tokenizer, "data.chat")
    ask: Chat = [{"role": "user", "content": _ASKED}]
    try:
        opened, [answer] = render_answers(tokenizer, ask, [[{"role": "assistant", "content": _ANSWERED}]])
    except UserError as error:
        raise UserError(f"data.chat: the recipe {error}") from None
    if opened.count(_ASKED) != 1 or answer.count(_ANSWERED) != 1:
        raise UserError("data.chat: the model's chat template does not write a message as it is: leave chat out")
    prompt = _literal(opened).replace(_ASKED, template.prompt)
    return replace(template, prompt=prompt, answer=_literal(answer).replace(_ANSWERED, template.answer.strip()))


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
