"""The proximal step that makes gates sparse, and an optimizer that takes it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.peft_bridge import active_adapter
from rankwise.ranks.sora import SoraConfig, gates


def soft_threshold(x: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Compute ``sign(x) * max(|x| - threshold, 0)``: the proximal map of ``threshold * ||x||_1``.

    Args:
        x: any shape.
        threshold: 0 or more, in the units of x.

    Raises:
        UserError: a negative threshold.

    Source: SoRA (arXiv 2311.11696), equation 6. The authors' code differs: see :func:`published_step`.
    """
    if not threshold >= 0:
        raise UserError(f"threshold {threshold} is not possible: it must be 0 or more")
    return torch.sign(x) * torch.clamp(x.abs() - threshold, min=0)


def published_step(x: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """The step of SoRA's published code: shrink by the threshold, then zero all that is still below it.

    What starts between one and two thresholds becomes zero as well, so it is no proximal map; kept for reproduction.
    """
    shrunk = soft_threshold(x, threshold)
    return torch.where(shrunk.abs() < threshold, torch.zeros_like(shrunk), shrunk)


def sora_optimizer(
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    gate_lr: float | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Any torch optimizer over the trainable parameters, with the proximal step on the gates after each of its steps.

    Gates form a group of their own, with their own learning rate and no weight decay. Before each step the gradient of
    the L1 term ``l1 * mean |g|`` is added to the gates' gradient (so clipping comes before it); after each step
    ``g <- soft_threshold(g, threshold)``, or the published variant where the config says ``mode="reference"``.
    ``l1`` and ``threshold`` are read from the adapter's config at each step, so that a schedule may change them. A
    gate that has become zero may grow again. The published code adds the L1 term to the loss instead, where it is
    clipped with the rest; ``mode="reference"`` reproduces its step, not that.

    Args:
        model: a PEFT model whose active adapter is SoRA.
        optimizer: the class to make.
        lr: learning rate of all but the gates.
        gate_lr: learning rate of the gates; ``lr`` where it is not given.
        **kwargs: the optimizer's other settings.

    Raises:
        UserError: the active adapter is not SoRA.

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
    attach_proximal_step(made, model)
    return made


def attach_proximal_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make every ``optimizer.step()`` add the L1 gradient before and take the proximal step after.

    The hooks follow the optimizer's own call, so a step that a gradient scaler skips has no proximal step either.
    """
    config: SoraConfig = model.peft_config[active_adapter(model)]  # type: ignore[index, assignment]

    @torch.no_grad()
    def add_l1_gradient(*_: Any) -> None:
        live = [gate for gate in gates(model).values() if gate.grad is not None]
        count = sum(gate.numel() for gate in live)
        for gate in live:
            gate.grad.add_(torch.sign(gate), alpha=config.l1 / count)  # type: ignore[union-attr]

    @torch.no_grad()
    def shrink(*_: Any) -> None:
        step = published_step if config.mode == "reference" else soft_threshold
        for gate in gates(model).values():
            gate.copy_(step(gate, config.threshold))

    optimizer.register_step_pre_hook(add_l1_gradient)
    optimizer.register_step_post_hook(shrink)
