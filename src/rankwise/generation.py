"""What a model writes after a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rankwise.likelihood import evaluating
from rankwise.tokenise import end_token, pad_left, padding_token


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    most: int,
    batch_size: int = 64,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """What the model writes after each prompt: greedy, at most ``most`` tokens, up to the end-of-text token.

    Whatever the model's own generation settings say (penalties, beams, sampling) does not apply, and dropout is off.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: the model's.
        prompts: token ids of each; with ``most`` more they fit the model's positions.
        most: tokens of an answer.
        batch_size: prompts at a time; those of similar length go together.
        advance: is told after each batch how many prompts it had, to show progress.
    """
    device, padding = next(model.parameters()).device, padding_token(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=padding, eos_token_id=end_token(tokenizer)
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids, mask = pad_left([prompts[index] for index in picked], padding)
        with evaluating(model), _no_settings_of_its_own(model):
            written = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )[:, ids.shape[1] :]
        for index, text in zip(picked, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text
        if advance is not None:
            advance(len(picked))
    return texts


@contextlib.contextmanager
def _no_settings_of_its_own(model: nn.Module) -> Iterator[None]:
    """Empty generation settings meanwhile: what a call leaves unsaid, ``generate`` would take from the model's own."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own
