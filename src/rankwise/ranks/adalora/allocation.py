"""AdaLoRA as PEFT has it, with its allocator driven rightly: noting importance, cutting ranks, and saving both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora import RankAllocator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rankwise.errors import UserError
from rankwise.files import write_bytes
from rankwise.peft_bridge import adapted_layers
from rankwise.ranks.adalora.checks import adalora_config, check_adapter, check_schedule
from rankwise.reading import open_tensors, parse_json

COUNTS = ("step", "skipped", "history")  # in the metadata of a saved allocation


class Allocated(NamedTuple):
    """One allocation: the optimizer step, counted from 1, the budget at it, and how many directions it left alive."""

    step: int
    budget: int
    live: int


def adalora_ranks(model: nn.Module) -> dict[str, int]:
    """Live directions of each layer, by its name in the base model: those whose value in E is not zero.

    E starts at zero, so before the first step there are none.

    Raises:
        UserError: the active adapter is not AdaLoRA.
    """
    adapter, _ = adalora_config(model)
    return {name: int(layer.lora_E[adapter].count_nonzero()) for name, layer in adapted_layers(model, adapter)}


def set_schedule(model: nn.Module, total: int, warmup_share: float, final_share: float) -> None:
    """Lay an adapter's schedule over a training whose length was not known when the adapter was made.

    Args:
        model: a PEFT model whose active adapter is AdaLoRA.
        total: optimizer steps of the training.
        warmup_share: share of them in which all directions are trained before the first is cut.
        final_share: share of them, at the end, in which the ranks stay.

    Raises:
        UserError: the active adapter is not AdaLoRA, or no step is left to cut in.
    """
    _, config = adalora_config(model)
    first, final = round(warmup_share * total), round(final_share * total)
    if first >= total - final:
        raise UserError(
            f"AdaLoRA has {total} steps, of which {first} are its warm-up and {final} its end: none is left to "
            "allocate ranks in; train for more steps, or lower one of the shares"
        )
    config.total_step, config.tinit, config.tfinal = total, first, final


class AdaloraAllocation:
    """The allocation of one training, step by step, for a loop of one's own; :class:`AdaloraCallback` is the Trainer's.

    ::

        allocation = AdaloraAllocation(model, total=steps)
        for number in range(1, steps + 1):
            model(**batch).loss.backward()
            optimizer.step()
            allocation.step(number)      # gradients are still there
            optimizer.zero_grad()
        allocation.finish()

    Importance, budget and masks are PEFT's own (``RankAllocator``). What differs is when they are asked for:

    - Steps count from 1, so that the last allocation, at ``total_step - tfinal``, is reached with ``tfinal=0`` too.
    - A step is counted once, however often it is announced.
    - Where gradients are not finite (a step that a scaler skipped), the importance stays what it was, and ``skipped``
      counts the step. What has no gradient has the importance 0 in that step.
    - ``config.rank_pattern`` is stated by :meth:`finish`, not before: PEFT cuts what it saves by the pattern, and a
      checkpoint so cut fits neither a new adapter nor the optimizer's state.

    Do not call the model's own ``update_and_allocate`` beside it.

    Args:
        model: a PEFT model whose active adapter is AdaLoRA and was not trained with another allocation.
        total: optimizer steps of the training.

    Attributes:
        history: the allocations, in order.
        skipped: steps of which no importance was noted.

    Raises:
        UserError: the adapter is not AdaLoRA, is not trainable, ended an allocation before, was made for another number
            of steps, has nothing to cut or no steps to cut in, has a setting that AdaLoRA ignores, or a name that
            PEFT's allocator would mistake.

    Source: AdaLoRA (arXiv 2303.10512), algorithm 1.
    """

    def __init__(self, model: nn.Module, total: int) -> None:
        self.adapter, self.config = adalora_config(model)
        self.model: Any = model
        self.layers = dict(adapted_layers(model, self.adapter))
        check_adapter(self.model, self.adapter, self.layers)
        check_schedule(self.config, total)
        self.allocator: RankAllocator = model.base_model.rankallocator  # type: ignore[union-attr]
        self.history: list[Allocated] = []
        self.skipped = 0
        self._done, self._kept = 0, dict[str, list[bool]]()

    @property
    def last(self) -> int:
        """The step of the last allocation; ranks stay after it."""
        return int(self.config.total_step) - int(self.config.tfinal)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Note the importance and cut to the budget, after the optimizer's step and before gradients are dropped.

        Args:
            number: of the optimizer step, from 1.

        Raises:
            UserError: no direction has a gradient, or PEFT's ``update_and_allocate`` was called as well.
        """
        if number <= self._done:
            return
        if self.config.rank_pattern is not None:
            raise UserError("update_and_allocate was called beside AdaLoRA's allocation: leave that call out")
        self._done = number
        base, allocator = self.model.get_base_model(), self.allocator
        if number < self.last:
            with self._gradients() as usable:
                if usable:
                    allocator.update_ipt(base)
            self.skipped += not usable
        budget, due = allocator.budget_schedule(number)
        if number > self.last and self._kept:
            allocator.mask_using_rank_pattern(base, self._kept)
        elif number <= self.last and allocator.ipt and (due or number == self.last):
            self._kept = allocator.mask_to_budget(base, budget)
            self.history.append(Allocated(number, budget, sum(map(sum, self._kept.values()))))
        if number == self.last:
            allocator.reset_ipt()

    def finish(self) -> None:
        """State the ranks in the config, so that what is saved holds live directions only.

        A warning tells where the budget is not met: the adapter is whole then, but its ranks are not those wanted.
        """
        live, budget = sum(adalora_ranks(self.model).values()), self.allocator.target_bgt
        cut = self._done >= self.last and bool(self.history)
        if cut and live <= budget:
            self.config.rank_pattern = {
                f"{name}.lora_E.{self.adapter}": layer.lora_E[self.adapter].ne(0).flatten().tolist()
                for name, layer in self.layers.items()
            }
        if cut and live == budget:
            return
        if self._done < self.last:
            reason = f"training ended at step {self._done}, before the last allocation at step {self.last}"
        elif not cut:
            reason = f"none of the gradients until step {self.last} were finite"
        elif live > budget:
            reason = "weights of a step before the last allocation were loaded back (load_best_model_at_end, say)"
        else:
            reason = "directions of equal importance are cut together, as those of layers without a gradient are"
        warnings.warn(f"AdaLoRA left {live} live directions, its budget is {budget}: {reason}", stacklevel=2)

    def save(self, file: Path) -> None:
        """Write what a checkpoint needs to go on from beside weights and optimizer: averages, masks and history."""
        tensors = {f"importance.{name}": value for name, value in self.allocator.exp_avg_ipt.items()}
        tensors |= {f"uncertainty.{name}": value for name, value in self.allocator.exp_avg_unc.items()}
        tensors |= {f"kept.{name}": torch.tensor(mask) for name, mask in self._kept.items()}
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        counts = dict(zip(COUNTS, map(json.dumps, (self._done, self.skipped, self.history)), strict=True))
        write_bytes(file, save(held, counts))

    def load(self, file: Path, step: int) -> None:
        """Go on from what :meth:`save` wrote after a step.

        Raises:
            UserError: the file is missing or unreadable, or is of another step or adapter.
        """
        counts, tensors = _read(file)
        here = dict(self._parameters())
        shapes = {f"{kind}.{name}": p.shape for kind in ("importance", "uncertainty") for name, p in here.items()}
        shapes |= {f"kept.{name}": p.shape[:1] for name, p in here.items()}
        if counts.get("step") != step or any(shapes.get(key) != tensor.shape for key, tensor in tensors.items()):
            raise UserError(f"{file} is of another step than {step}, or of another adapter: resume from its own folder")
        held = {name: p for name, p in here.items() if f"importance.{name}" in tensors}
        try:
            uncertainty = {name: tensors[f"uncertainty.{name}"].to(p) for name, p in held.items()}
            history, skipped = [Allocated(*map(int, entry)) for entry in counts["history"]], int(counts["skipped"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error!r}): resume from another checkpoint") from error
        self.allocator.ipt = {name: torch.zeros_like(p) for name, p in held.items()}
        self.allocator.exp_avg_ipt = {name: tensors[f"importance.{name}"].to(p) for name, p in held.items()}
        self.allocator.exp_avg_unc = uncertainty
        self._kept = {name: tensors[f"kept.{name}"].tolist() for name in here if f"kept.{name}" in tensors}
        self.history, self.skipped, self._done = history, skipped, step

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the allocator looks at, by the names that it uses."""
        for name, layer in self.layers.items():
            for part in ("lora_A", "lora_E", "lora_B"):
                yield f"{name}.{part}.{self.adapter}", getattr(layer, part)[self.adapter]

    @contextmanager
    def _gradients(self) -> Iterator[bool]:
        """Whether this step's gradients are finite; inside, those that are missing are zeros."""
        parameters = dict(self._parameters())
        if all(p.grad is None for name, p in parameters.items() if ".lora_E." in name):
            raise UserError(
                "no direction of AdaLoRA has a gradient: call step after loss.backward() and before zero_grad(), with "
                "the adapter active"
            )
        missing = [p for p in parameters.values() if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        try:
            yield bool(get_total_norm([p.grad for p in parameters.values() if p.grad is not None]).isfinite())
        finally:
            for p in missing:
                p.grad = None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Counts and tensors of a file that :meth:`AdaloraAllocation.save` wrote."""
    if not file.is_file():
        raise UserError(
            f"{file} does not exist, and AdaLoRA cannot go on without the importance that it gathered: resume from a "
            "checkpoint that AdaloraCallback wrote, give its folder as AdaloraCallback(checkpoint=...), or start anew"
        )
    with open_tensors(file, "resume from another checkpoint") as opened:
        metadata, tensors = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
    try:
        return {name: parse_json(value) for name, value in metadata.items() if name in COUNTS}, tensors
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): resume from another checkpoint") from error
