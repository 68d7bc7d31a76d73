"""An optimizer whose steps make SoRA's gates sparse, for plain loops and for transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import UserError
from rankwise.peft_bridge import active_adapter
from rankwise.ranks.sora.config import SoraConfig
from rankwise.ranks.sora.gate_steps import GateSteps
from rankwise.ranks.sora.layer import gates


def sora_optimizer(
    model: nn.Module,
    optimizer: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    gate_lr: float | None = None,
    total_steps: int | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Any torch optimizer over the trainable parameters, with the proximal step on the gates after each of its steps.

    Gates form a group of their own, with their own learning rate and no weight decay. Before each step the gradient of
    the L1 term ``l1 * mean |g|`` is added to the gates' gradient (so clipping comes before it); after each step
    ``g <- soft_threshold(g, threshold)``, or the published variant where the config says ``mode="reference"``. The
    threshold is the config's (times the gates' learning rate with ``threshold_scaling="learning_rate"``), or the one
    that its budget asks for; ``shrink_after`` cuts what stays closed. A gate that has become zero and is not cut may
    grow again. The published code adds the L1 term to the loss instead, where it is clipped with the rest;
    ``mode="reference"`` reproduces its step, not that.

    Args:
        model: a PEFT model whose active adapter is SoRA.
        optimizer: the class to make.
        lr: learning rate of all but the gates.
        gate_lr: learning rate of the gates; ``lr`` where it is not given.
        total_steps: optimizer steps of the training; a budget needs it.
        **kwargs: the optimizer's other settings.

    Raises:
        UserError: the active adapter is not SoRA; in training, every gate was closed at once.

    Source: SoRA (arXiv 2311.11696), section 3.2 and algorithm 1.
    """
    gate_parameters = list(gates(model).values())
    of_gates = {id(gate) for gate in gate_parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in of_gates]
    groups = [
        {"params": others, "lr": lr},
        {"params": gate_parameters, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
    ]
    made = optimizer(groups, **kwargs)
    attach_proximal_step(made, model, total_steps)
    return made


def attach_proximal_step(optimizer: Optimizer, model: nn.Module, total_steps: int | None = None) -> GateSteps:
    """Make every ``optimizer.step()`` add the L1 gradient before and take the proximal step after.

    Args:
        optimizer: any, with the gates among its parameters.
        model: a PEFT model whose active adapter is SoRA.
        total_steps: optimizer steps of the training; a budget needs it.

    Raises:
        UserError: as for :func:`sora_optimizer`.
    """
    made = GateSteps(model, optimizer, total_steps)
    optimizer.gate_steps = made  # type: ignore[attr-defined]
    return made


def attached_steps(optimizer: Any) -> GateSteps | None:
    """What :func:`attach_proximal_step` attached to an optimizer, also to one that accelerate has wrapped."""
    return getattr(getattr(optimizer, "optimizer", optimizer), "gate_steps", None)


def optimizer_factory() -> Callable[..., Optimizer]:
    """For ``Trainer(optimizer_cls_and_kwargs=(rankwise.ranks.optimizer_factory, {"lr": 8e-4, "weight_decay": 0.1}))``.

    The trainer calls it and hands its model and the settings to what it returns, :func:`sora_optimizer`.
    """
    return sora_optimizer


class SoraCallback(TrainerCallback):
    """Tells the gates of a ``transformers.Trainer`` how long the training is, and the log how they are.

    The trainer's own number of steps replaces ``total_steps``. Callbacks that stand before this one see a log without
    the gates; ``state.log_history`` has them.

    Raises:
        UserError: at the start, where the adapter is SoRA and the trainer's optimizer takes no proximal step, so that
            no gate would ever close, or with ``load_best_model_at_end`` beside ``shrink_after``.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trainer's hook."""
        steps = attached_steps(optimizer)
        if steps is not None:
            steps.set_total_steps(state.max_steps)
            if args.load_best_model_at_end and steps.config.shrink_after is not None:
                raise UserError(
                    "load_best_model_at_end would load a checkpoint from before directions were cut: leave it out, or "
                    "leave shrink_after out"
                )
        elif isinstance(model, PeftModel) and isinstance(model.peft_config[active_adapter(model)], SoraConfig):
            raise UserError(
                "the trainer's optimizer takes no proximal step, so that no gate would close: give it "
                "optimizers=(rankwise.sora_optimizer(model, lr=...), None)"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trainer's hook: add how many gates are open, the parameters left and the threshold."""
        steps = attached_steps(optimizer)
        if steps is not None and logs is not None:
            status = steps.status()
            logs |= status
            if state.log_history:
                state.log_history[-1] |= status

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Trainer's hook: say so where a budget was not met."""
        steps = attached_steps(optimizer)
        if steps is None or steps.budget is None:
            return
        left, budget = steps.status()["parameters_left"], steps.budget
        if left > budget.target:
            reason = f"it was to be met at step {budget.steps}, and {steps.step} were taken"
            if budget.support is not None:
                reason = "weights from before it was met were loaded back (load_best_model_at_end, say)"
            warnings.warn(
                f"the budget of {budget.target:,} parameters is not met, {left:,} are left: {reason}", stacklevel=2
            )
