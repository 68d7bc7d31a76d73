"""What happens to SoRA's gates around each optimizer step: the L1 gradient, the proximal step, the cut."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import UserError
from rankwise.peft_bridge import active_adapter
from rankwise.processes import where_all, world_size
from rankwise.ranks.resizing import forget_empty, resize_adapter
from rankwise.ranks.sora.budget import Budget, PathPoint
from rankwise.ranks.sora.config import SoraConfig
from rankwise.ranks.sora.flat_gates import FlatGates
from rankwise.ranks.sora.proximal import published_step, soft_threshold
from rankwise.ranks.sora.pruning import keep_least

logger = logging.getLogger(__name__)

HOOK = "held_hook"  # on a gate: what masks the gradient of those that are held
STATE = "sora_gates"  # in the optimizer's state dict


class AllGatesClosed(UserError):
    """A threshold closed every gate that was open; the gates are as they were before the step."""


class GateSteps:
    """The gates of one adapter, around the steps of one optimizer.

    Before a step the gradient of ``l1 * mean |g|`` is added to that of the gates. After it the gates are shrunk, by the
    config's threshold or by the one that a budget asks for, and directions whose gate has been zero for
    ``shrink_after`` steps are cut out of the model and of the optimizer's state. Of several processes, whose wrappers
    hold the shapes that they began with, none cuts: all keep the same gates closed for good, so that the same
    directions are left when ``prune`` cuts them after the training. A step that a gradient scaler skips
    is no step here either, nor is one that is taken while another adapter is active. ``threshold``, ``l1`` and
    ``shrink_after`` are read from the config at each step, so that they may change. The state travels in the
    optimizer's own state dict.

    Args:
        model: whose active adapter is SoRA.
        optimizer: of its gates.
        total_steps: of the training, where there is a budget; 1 or more.

    Attributes:
        step: steps taken.
        threshold: of the last one.
        budget: the way to a budget, once the length of the training is known.
        removed: names of the layers that lost their adapter, in order.
        held: which gates several processes keep closed.

    Raises:
        UserError: the optimizer does not train the gates or has such steps already. In training: a budget without
            ``total_steps``, every gate was closed (:class:`AllGatesClosed`), the adapter is merged, the step has a
            closure, or a resumed state is of another adapter.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.adapter = active_adapter(model)
        self.config: SoraConfig = model.peft_config[self.adapter]  # type: ignore[index, assignment]
        self.step, self.threshold, self.skipped = 0, 0.0, False
        self.budget: Budget | None = None
        self.removed: list[str] = []
        self.resumed: dict[str, Any] = {}
        self.gates = FlatGates(model, self.adapter)
        self.closed_for = torch.zeros_like(self.gates.sizes)
        self.held = self.closed_for > 0
        self._hold_no_more()
        self._begun = False
        if getattr(optimizer, "gate_steps", None) is not None:
            raise UserError("this optimizer takes a proximal step already: a second one would shrink the gates twice")
        self.gates.check(optimizer)
        self.set_total_steps(total_steps)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_pre_hook(lambda _: self._synchronise())
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def set_total_steps(self, total_steps: int | None) -> None:
        """Say how many steps the training has, from which a budget's schedule follows; None where it is not known."""
        target = self.config.parameters_to_keep()
        if target is None or total_steps is None:
            return
        if total_steps < 1:
            raise UserError(f"total_steps {total_steps} is not possible: a training has 1 step or more")
        before, self.budget = self.budget, Budget(target, max(1, round(self.config.budget_by * total_steps)))
        if before is not None:
            self.budget.path, self.budget.support = before.path, before.support
        elif self.resumed:
            self._resume_budget(self.budget, self.resumed)
            self.resumed = {}
        elif self.gates.parameters_left(self.gates.read()) <= target:  # met before, by an earlier training
            self.budget.support = self.gates.read() != 0

    @torch.no_grad()
    def _before(self, _: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.skipped = self.adapter not in self.model.active_adapters or self._overflown()  # type: ignore[operator]
        if self.skipped:
            return
        if any(given is not None for given in (*arguments[1:], options.get("closure"))):
            raise UserError("a step with a closure computes its gradients too late for the L1 term: call step() alone")
        if merged := next((layer for layer in self.gates.layers if layer.merged), None):
            raise UserError(
                f"{', '.join(merged.merged_adapters)} is merged into the weights while gates are trained: call "
                "unmerge_adapter() first, and merge when training has ended"
            )
        if self.budget is None and self.config.parameters_to_keep() is not None:
            raise UserError(
                "a budget of parameters needs to know how long the training is: give total_steps to sora_optimizer, or "
                "rankwise.ranks.SoraCallback to the trainer"
            )
        if all(weight.grad is None for group in self.optimizer.param_groups for weight in group["params"]):
            self.skipped = True  # the step is left out
            return
        self._synchronise()
        if self._begun:
            self.gates.check_dtype()
        else:  # what wraps models and optimizers may have put other weights in their place since
            self.gates.check(self.optimizer)
            self._begun = True
        self.last = self.gates.read()
        self._add_l1()

    def _overflown(self) -> bool:
        """Whether the optimizer itself will skip the step: a scaler tells fused ones, and does not call the others."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _add_l1(self) -> None:
        """Add the gradient of the L1 term, scaled as the gradients are where the optimizer unscales them itself."""
        trained = [(gate.detach(), gate.grad) for gate in self.gates.parameters if gate.grad is not None]
        if not self.config.l1 or not trained or self._supported():
            return
        weight = self.config.l1 / (self.config.initial_gates or len(self.last))
        scale = getattr(self.optimizer, "grad_scale", None)
        weight *= 1.0 if scale is None else float(scale)
        signs = torch._foreach_sign([gate for gate, _ in trained])
        torch._foreach_add_([gradient for _, gradient in trained], signs, alpha=weight)

    def _supported(self) -> bool:
        return self.budget is not None and self.budget.support is not None

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self.skipped:
            return
        self.step += 1
        flat = self.gates.read().masked_fill(self.held, 0)
        shrunk = self._shrunk(flat)
        if not shrunk.any() and flat.any():
            self.gates.write(self.last)
            raise AllGatesClosed(
                f"a threshold of {self.threshold:.4g} closed every one of {len(flat)} gates at step {self.step} (the "
                f"largest was {float(flat.abs().max()):.4g}): lower the threshold, or l1; the gates are as they were "
                "before the step"
            )
        self.gates.write(shrunk)
        if self.config.shrink_after is not None:
            self._cut(shrunk)

    def _shrunk(self, flat: Float[Tensor, " gates"]) -> Float[Tensor, " gates"]:
        """The gates after the proximal step, or as their budget has them."""
        if self.budget is not None:
            shrunk, self.threshold = self.budget.shrink(flat, self.gates.sizes, self.step)
            return shrunk
        self.threshold = self.config.threshold
        if self.config.threshold_scaling == "learning_rate":
            self.threshold *= self._learning_rate()
        step = published_step if self.config.mode == "reference" else soft_threshold
        return step(flat, self.threshold)

    def _learning_rate(self) -> float:
        """Of the gates, now."""
        first = id(self.gates.parameters[0])
        groups = self.optimizer.param_groups
        return next(float(group["lr"]) for group in groups if any(id(gate) == first for gate in group["params"]))

    def _cut(self, flat: Float[Tensor, " gates"]) -> None:
        """Count the steps for which gates were zero, and cut the directions of those that waited long enough."""
        assert self.config.shrink_after is not None
        self.closed_for = torch.where(flat == 0, self.closed_for + 1, 0)
        due = self.closed_for >= self.config.shrink_after
        if world_size() > 1:
            self._hold(where_all(due))
            return
        if not due.any():
            return
        kept = keep_least(self.model, self.adapter, self.gates.by_layer(~due))
        mask = torch.cat(list(kept.values()))
        fewer = {name: stays for name, stays in kept.items() if not stays.all()}
        if not fewer:
            return
        gone = resize_adapter(self.model, fewer, optimizer=self.optimizer, adapter=self.adapter)
        for name in gone:
            logger.info("step %d: %s has no open gate left, its adapter is removed", self.step, name)
        self.removed += gone
        self.gates.find()
        self.closed_for, self.held = self.closed_for[mask], self.held[mask]
        if self.budget is not None and self.budget.support is not None:
            self.budget.support = self.budget.support[mask]

    def _hold(self, due: Bool[Tensor, " gates"]) -> None:
        """Keep those gates closed from now on whose directions one process would cut; their gradient is zero too."""
        if not (due & ~self.held).any():
            return
        masks = zip(self.gates.by_layer(due).items(), self.gates.by_layer(self.held).values(), strict=True)
        waiting = {name: ~mask[~held] for (name, mask), held in masks if not held.all()}
        kept = keep_least(self.model, self.adapter, waiting)
        for name, stays in kept.items():
            if not stays.any():
                logger.info("step %d: %s has no open gate left", self.step, name)
                self.removed.append(name)
        self._set_held(self.held.masked_scatter(~self.held, ~torch.cat(list(kept.values()))))

    def _set_held(self, held: Bool[Tensor, " gates"]) -> None:
        self.held = held
        for number, gate in enumerate(self.gates.parameters):
            if HOOK not in gate.__dict__:
                masked = partial(self._masked_gradient, number)
                gate.__dict__[HOOK] = gate.register_hook(masked)  # type: ignore[no-untyped-call]

    def _hold_no_more(self) -> None:
        """Begin anew: an earlier training of these gates may have held others than are closed now."""
        for gate in self.gates.parameters:
            if (hook := gate.__dict__.pop(HOOK, None)) is not None:
                hook.remove()
        if world_size() > 1 and self.config.shrink_after is not None:
            self._set_held(self.gates.read() == 0)

    def _masked_gradient(self, number: int, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(torch.split(self.held, self.gates.lengths)[number], 0)

    def _synchronise(self) -> None:
        """Follow what was done to the gates from outside: they were cut, by prune or a checkpoint, or moved."""
        if not self.gates.changed():
            return
        before = len(self.closed_for)
        self.gates.find()
        forget_empty(self.optimizer)
        cut = len(self.gates.sizes) != before
        self.closed_for = torch.zeros_like(self.gates.sizes) if cut else self.closed_for.to(self.gates.device)
        self.held = self.closed_for > 0 if cut else self.held.to(self.gates.device)
        if self.budget is not None and self.budget.support is not None:
            self.budget.support = self.gates.read() != 0 if cut else self.budget.support.to(self.gates.device)

    def status(self) -> dict[str, int | float]:
        """What to log: open gates, all there were at first, parameters left, the threshold, and a budget's target."""
        self._synchronise()
        flat = self.gates.read()
        found: dict[str, int | float] = {
            "gates_left": int((flat != 0).sum()),
            "gates": self.config.initial_gates or len(flat),
            "parameters_left": self.gates.parameters_left(flat),
            "threshold": self.threshold,
        }
        target = self.config.parameters_to_keep()
        return found if target is None else found | {"parameters_target": target}

    def _save(self, _: Optimizer, state: dict[str, Any]) -> None:
        state[STATE] = {
            "r": self.config.r,
            "gates": self.config.initial_gates,
            "step": self.step,
            "closed_for": self.closed_for,
            "held": self.held,
            "path": [list(point) for point in self.budget.path] if self.budget else [],
            "support": self.budget.support if self.budget else None,
            "removed": list(self.removed),
        }

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._synchronise()
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
        self.step, self.removed = found["step"], list(found["removed"])
        self.closed_for = found["closed_for"].to(self.gates.device)
        if "held" in found:
            self.held = found["held"].to(self.gates.device)  # one process cuts them at its first step
            if world_size() > 1:
                self._set_held(self.held)
        self.resumed = found if self.step else {}  # a trainer also loads the state of an optimizer that is new
        if self.budget is not None and self.resumed:
            self._resume_budget(self.budget, found)

    def _resume_budget(self, budget: Budget, found: dict[str, Any]) -> None:
        budget.path = [PathPoint(*point) for point in found["path"]]
        budget.support = None if found["support"] is None else found["support"].to(self.gates.device)
