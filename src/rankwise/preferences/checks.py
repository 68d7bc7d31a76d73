"""What the trainer refuses before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from rankwise.errors import UserError
from rankwise.likelihood import unwrapped
from rankwise.preferences.config import SoftmaxDPOConfig


def check_arguments(
    model: Any, args: Any, tokenizer: Any, peft_config: PeftConfig | None, others: Mapping[str, Any]
) -> None:
    """Refuse what would fail late, or be ignored in silence.

    Raises:
        UserError: with the remedy.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"SoftmaxDPOTrainer needs a model, not {model!r}: load it with AutoModelForCausalLM first")
    if not isinstance(args, SoftmaxDPOConfig):
        raise UserError(f"SoftmaxDPOTrainer needs a SoftmaxDPOConfig as args, not {type(args).__name__}")
    if tokenizer is None:
        raise UserError("SoftmaxDPOTrainer needs the tokenizer: give it as processing_class")
    if peft_config is not None and isinstance(model, PeftModel):
        raise UserError("the model has an adapter already: leave peft_config out, or give the model without it")
    spread = args.fsdp or args.deepspeed or getattr(unwrapped(model), "is_distributed_loading_by_transformers", False)
    if args.negatives == "hard" and spread:
        raise UserError(
            "hard negatives are mined by each process alone, and weights that are spread over processes would wait for"
            " all of them: draw others, or give each process the whole model"
        )
    if others.get("compute_metrics") is not None:
        raise UserError("compute_metrics would never be called: leave it out, and see the measures that are logged")


def check_positions(model: nn.Module, longest: int) -> None:
    """A model has only so many positions; beyond them some fail, and others get worse.

    Raises:
        UserError: a prompt with an answer has more tokens.
    """
    most = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < longest:
        raise UserError(
            f"a prompt with an answer has {longest} tokens, and the model {most} positions: max_length={most}"
        )
