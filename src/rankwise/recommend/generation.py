"""What a model writes after a prompt, for the papers' protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rankwise.recommend.ranking import GENERATED, EncodedCase
from rankwise.tokenise import end_token, pad_left, padding_token


@torch.no_grad()
def generate_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EncodedCase], batch_size: int = 64
) -> list[str]:
    """What the model writes after each prompt: greedy, at most 20 tokens, as in the papers' protocol.

    Whatever the model's own generation settings say (penalties, beams, sampling) does not apply.
    """
    device, padding = next(model.parameters()).device, padding_token(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=GENERATED, do_sample=False, num_beams=1, pad_token_id=padding, eos_token_id=end_token(tokenizer)
    )
    order = sorted(range(len(cases)), key=lambda index: len(cases[index].prompt))
    texts = [""] * len(cases)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids, mask = pad_left([cases[index].prompt for index in picked], padding)
        with _no_settings_of_its_own(model):
            written = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )[:, ids.shape[1] :]
        for index, text in zip(picked, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text
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
