"""Prompt and prefix tuning through PEFT, with positions that padding on the left does not change."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel

from rankwise.errors import UserError
from rankwise.likelihood import forward_arguments, position_ids


def with_virtual_tokens(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base with trained vectors before each row.

    PEFT lets a decoder count positions from the row's first column, padding or not, so that a row's values would depend
    on the longest one in its batch. Here positions count what is seen: the virtual tokens, then the row's own.

    Args:
        base: a decoder, an encoder or both.
        config: of prompt or prefix tuning.

    Raises:
        UserError: prompt tuning of a classifier that reads a row's last token, which it cannot find behind vectors; or
            the model has no place for the method.
    """
    if config.peft_type == PeftType.PROMPT_TUNING and config.task_type == "SEQ_CLS" and hasattr(base, "score"):
        raise UserError(
            f"adapter.kind prompt does not go with {type(base).__name__}, which reads the last token of a row and "
            "finds it by the row's ids, which prompt tuning replaces by vectors: take prefix or another method"
        )
    try:
        model: PeftModel = peft.get_peft_model(base, config)
    except (ValueError, TypeError, AttributeError) as error:  # PEFT's words for a model without the settings it reads
        raise UserError(f"{config.peft_type.value} does not go with {type(base).__name__}: {error}") from error
    if config.task_type == "CAUSAL_LM" and "position_ids" in forward_arguments(model):
        base.register_forward_pre_hook(_count_what_is_seen, with_kwargs=True)
    return model


def _count_what_is_seen(_: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A hook: positions from the mask, where PEFT gave none."""
    mask, given = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    row = given if given is not None else inputs.get("input_ids")
    if inputs.get("position_ids") is not None or mask is None or mask.ndim != 2 or row is None:
        return None
    return args, inputs | {"position_ids": position_ids(mask.long())[:, -row.shape[1] :]}
