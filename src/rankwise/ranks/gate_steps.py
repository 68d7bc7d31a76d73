"""What happens to SoRA's gates around each optimizer step: the L1 gradient, the proximal step, the cut."""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import UserError
from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.ranks.budget import Budget, PathPoint
from rankwise.ranks.proximal import published_step, soft_threshold
from rankwise.ranks.pruning import keep_least
from rankwise.ranks.resizing import check_one_process, forget_empty, resize_adapter
from rankwise.ranks.sora import direction_size, gates
from rankwise.ranks.sora_config import SoraConfig

logger = logging.getLogger(__name__)

STATE = "sora_gates"  # in the optimizer's state dict


class GateSteps:
    """The gates of one model, around the steps of one optimizer.

    Before a step the gradient of ``l1 * mean |g|`` is added to that of the gates. After it the gates are shrunk, by the
    config's threshold or by the one that a budget asks for, and directions whose gate has been zero for
    ``shrink_after`` steps are cut out of the model and of the optimizer's state. A step that a gradient scaler skips
    is no step here either. ``threshold``, ``l1`` and ``shrink_after`` are read from the config at each step, so that
    they may change. The state travels in the optimizer's own state dict.

    Args:
        model: whose active adapter is SoRA.
        optimizer: of its gates.
        total_steps: of the training, where there is a budget.

    Raises:
        UserError: a budget without ``total_steps``, or ``shrink_after`` in several processes. In training: every gate
            was closed (the gates stay as they were before the step), the learning rate of the gates is not known, or
            a resumed state is of another adapter.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.adapter = active_adapter(model)
        self.config: SoraConfig = model.peft_config[self.adapter]  # type: ignore[index, assignment]
        self.step, self.threshold = 0, 0.0
        self.budget: Budget | None = None
        self.resumed: dict[str, Any] = {}
        self._find_gates()
        self.set_total_steps(total_steps)
        if self.config.shrink_after is not None:
            check_one_process("shrink_after")
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def set_total_steps(self, total_steps: int | None) -> None:
        """Say how many steps the training has, from which a budget's schedule follows; None where it is not known."""
        target = self.config.budget
        if target is None or total_steps is None:
            return
        self.budget = Budget(target, max(1, round(self.config.budget_by * total_steps)))
        if self.resumed:
            self._resume_budget(self.budget, self.resumed)
        elif int(self.sizes[self._flat() != 0].sum()) <= target:  # met before, by an earlier training
            self.budget.support = self._flat() != 0

    def _find_gates(self) -> None:
        """Look the gates up: at the start, and whenever directions were cut."""
        layers = dict(adapted_layers(self.model, self.adapter))
        found = gates(self.model, self.adapter)
        self.names = list(found)
        self.parameters = list(found.values())
        self.lengths = [gate.numel() for gate in self.parameters]
        self.device = self.parameters[0].device
        sizes = [direction_size(layers[name], self.adapter) for name in found]
        counts = torch.tensor(self.lengths, device=self.device)
        self.sizes: Int[Tensor, " gates"] = torch.tensor(sizes, device=self.device).repeat_interleave(counts)
        self.closed_for: Int[Tensor, " gates"] = torch.zeros_like(self.sizes)

    def _flat(self) -> Float[Tensor, " gates"]:
        """All gates as one tensor, in float32 at least."""
        if [gate.numel() for gate in self.parameters] != self.lengths:  # cut from outside, by prune
            self._find_gates()
            if self.budget is not None and self.budget.support is not None:
                self.budget.support = self._flat() != 0
        first = self.parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.cat([gate.detach().to(first.device, dtype) for gate in self.parameters])

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        if self.config.budget is not None and self.budget is None:
            raise UserError(
                "a budget of parameters needs to know how long the training is: give total_steps to sora_optimizer, or "
                "rankwise.ranks.SoraCallback to the trainer"
            )
        self.last = self._flat()
        grads = [gate.grad for gate in self.parameters if gate.grad is not None]
        if self.config.l1 and grads and not self._supported():
            signs = torch._foreach_sign([gate.detach() for gate in self.parameters if gate.grad is not None])
            torch._foreach_add_(grads, signs, alpha=self.config.l1 / (self.config.initial_gates or len(self.last)))

    def _supported(self) -> bool:
        return self.budget is not None and self.budget.support is not None

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self.step += 1
        flat = self._flat()
        shrunk = self._shrunk(flat)
        if not shrunk.any() and flat.any():
            self._write(self.last)
            raise UserError(
                f"a threshold of {self.threshold:.4g} closed every one of {len(flat)} gates at step {self.step} (the "
                f"largest was {float(flat.abs().max()):.4g}): lower the threshold, or l1; the gates are as they were "
                "before the step"
            )
        self._write(shrunk)
        if self.config.shrink_after is not None:
            self._cut(shrunk)

    def _shrunk(self, flat: Float[Tensor, " gates"]) -> Float[Tensor, " gates"]:
        """The gates after the proximal step; on the way to a budget its path grows, and later its support is kept."""
        if self.budget is not None and self.budget.support is not None:
            self.threshold = 0.0
            return flat * self.budget.support
        self.threshold = self._wanted(flat)
        step = published_step if self.config.mode == "reference" else soft_threshold
        shrunk = step(flat, self.threshold)
        if self.budget is not None:
            self.budget.note(shrunk, self.sizes, self.step, self.threshold)
        return shrunk

    def _wanted(self, flat: Float[Tensor, " gates"]) -> float:
        if self.budget is not None:
            return self.budget.threshold(flat, self.sizes, self.step)
        if self.config.threshold_scaling == "none":
            return self.config.threshold
        first = id(self.parameters[0])
        for group in self.optimizer.param_groups:
            if any(id(parameter) == first for parameter in group["params"]):
                return self.config.threshold * float(group["lr"])
        raise UserError("threshold_scaling='learning_rate' needs the gates in the optimizer: use sora_optimizer")

    def _write(self, flat: Float[Tensor, " gates"]) -> None:
        torch._foreach_copy_([gate.detach() for gate in self.parameters], list(torch.split(flat, self.lengths)))

    def _cut(self, flat: Float[Tensor, " gates"]) -> None:
        """Count the steps for which gates were zero, and cut the directions of those that waited long enough."""
        assert self.config.shrink_after is not None
        self.closed_for = torch.where(flat == 0, self.closed_for + 1, 0)
        due = self.closed_for >= self.config.shrink_after
        if not due.any():
            return
        check_one_process("shrink_after")
        kept = keep_least(self.model, self.adapter, dict(zip(self.names, torch.split(~due, self.lengths), strict=True)))
        mask, closed_for = torch.cat(list(kept.values())), self.closed_for
        gone = resize_adapter(self.model, kept, optimizer=self.optimizer, adapter=self.adapter)
        for name in gone:
            logger.info("step %d: %s has no open gate left, its adapter is removed", self.step, name)
        self._find_gates()
        self.closed_for = closed_for[mask]
        if self.budget is not None and self.budget.support is not None:
            self.budget.support = self.budget.support[mask]

    def status(self) -> dict[str, int | float]:
        """What to log: open gates, all there were at first, parameters left, the threshold, and a budget's target."""
        flat = self._flat()
        found: dict[str, int | float] = {
            "gates_left": int((flat != 0).sum()),
            "gates": self.config.initial_gates or len(flat),
            "parameters_left": int(self.sizes[flat != 0].sum()),
            "threshold": self.threshold,
        }
        target = self.config.budget
        return found if target is None else found | {"parameters_target": target}

    def _save(self, _: Optimizer, state: dict[str, Any]) -> None:
        state[STATE] = {
            "r": self.config.r,
            "gates": self.config.initial_gates,
            "step": self.step,
            "closed_for": self.closed_for,
            "path": [list(point) for point in self.budget.path] if self.budget else [],
            "support": self.budget.support if self.budget else None,
        }

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        forget_empty(optimizer)
        self._find_gates()
        found = state.get(STATE)
        if found is None:
            return
        if (found["r"], found["gates"]) != (self.config.r, self.config.initial_gates):
            raise UserError(
                f"the optimizer's state is of an adapter with r={found['r']} and {found['gates']} gates, this one "
                f"began with r={self.config.r} and {self.config.initial_gates}: resume with its own settings"
            )
        if len(found["closed_for"]) != len(self.closed_for):
            raise UserError(
                f"the optimizer's state is of {len(found['closed_for'])} gates, and {len(self.closed_for)} are here: "
                "load the adapter of the same checkpoint first"
            )
        self.step, self.resumed = found["step"], found
        self.closed_for = found["closed_for"].to(self.device)
        if self.budget is not None:
            self._resume_budget(self.budget, found)

    def _resume_budget(self, budget: Budget, found: dict[str, Any]) -> None:
        budget.path = [PathPoint(*point) for point in found["path"]]
        budget.support = None if found["support"] is None else found["support"].to(self.device)
