"""Several processes that train one model together, as torchrun or accelerate starts them: who writes, who waits."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from jaxtyping import Bool
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from rankwise.errors import UserError
from rankwise.files import in_use

PATIENCE = datetime.timedelta(minutes=10)  # that a process waits for another
OWN_WAYS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
LOST = re.compile(r"gloo|NCCL|connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def number_started() -> int:
    """How many processes of one training were started, by the environment of torchrun and accelerate.

    Raises:
        UserError: it says so in no number, or does not say which of them this is.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UserError(f"WORLD_SIZE {told!r} is no number of processes: unset it, or start with torchrun")
    if int(told) > 1 and "LOCAL_RANK" not in os.environ:  # each would take itself for the only one
        raise UserError(f"WORLD_SIZE is {told} and LOCAL_RANK is not set: unset it, or start with torchrun")
    return int(told)


def world_size() -> int:
    """How many processes compute together by now; 1 where none has joined others."""
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


class Processes:
    """The processes of one run, of which the first one writes.

    All of them do the same on the same data, so that what is collective (gradients, weights that are spread) meets;
    they differ in the rows that they train on.

    Attributes:
        number: how many there are.
        is_first: whether this is the one that writes and speaks.
    """

    def __init__(self) -> None:
        """Join the others, where there are any.

        Raises:
            UserError: they were started to spread the weights in a way of accelerate's own.
        """
        self.number = number_started()
        for name, way in OWN_WAYS.items():
            if os.environ.get(name, "false").lower() in ("1", "true"):
                raise UserError(
                    f"{name} is set: accelerate would spread the weights by {way}, and rankwise does it itself: start "
                    "with torchrun, and give the recipe model.shard=true where a device cannot hold the model"
                )
        self.is_first = self.number == 1 or self._state.is_main_process

    @cached_property
    def _state(self) -> PartialState:
        return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)

    def wait(self) -> None:
        """Go on when all are here."""
        if self.number > 1:
            self._state.wait_for_everyone()

    def told_by_first(self, number: int) -> int:
        """The number that the first one gives; all of them call it."""
        if self.number == 1:
            return number
        return int(gathered(torch.tensor([number], device=self._state.device))[0])

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Keep others than these processes out of a folder, which all of them must see.

        Raises:
            UserError: another process writes in it, or one of these does not see it.
        """
        self.wait()
        if not self.is_first:
            self.wait()
            if not folder.is_dir():
                raise UserError(
                    f"output {folder} is not there for process {self._state.process_index}: give a folder that all "
                    "processes see, on a shared filesystem where they are on several machines"
                )
            yield
            return
        with in_use(folder):
            self.wait()
            yield

    def share_of(self, batch: int, name: str) -> int:
        """The rows of a batch for each process.

        Raises:
            UserError: they cannot have the same number.
        """
        if batch % self.number:
            fitting = -(-batch // self.number) * self.number
            raise UserError(
                f"{name} {batch} is for all processes together, and cannot be shared out evenly among {self.number}: "
                f"give {fitting}, say"
            )
        return batch // self.number


@contextmanager
def loss_of_others_told() -> Iterator[None]:
    """Say it in one line where the block fails because another process has ended.

    Raises:
        UserError: instead of the error of the library that waited for it.
    """
    try:
        yield
    except (RuntimeError, distributed.DistError) as error:
        if number_started() == 1 or not (isinstance(error, distributed.DistError) or LOST.search(str(error))):
            raise
        raise UserError(
            "another process of this training has ended, or cannot be reached: its own message says why; the same "
            f"command goes on from the last checkpoint ({' '.join(str(error).split())[:200]})"
        ) from error


def any_of(device: torch.device, *wanted: bool) -> tuple[bool, ...]:
    """What any of the processes wants; all of them call it."""
    if world_size() == 1:
        return wanted
    flags = torch.tensor(wanted, dtype=torch.int32, device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return tuple(flag > 0 for flag in flags.tolist())


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: a start of MiLoRA is computed by each, on its own device."""
    if world_size() > 1:
        for buffer in model.buffers():
            if not is_spread(buffer):
                distributed.broadcast(buffer, 0)


def where_all(wanted: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Where all of the processes say so; all of them call it."""
    flags = wanted.to(torch.int32)
    if world_size() > 1:
        distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return flags > 0


def gathered(values: Tensor) -> Tensor:
    """The same tensor of each process, one after another in a new first dimension; all of them call it."""
    if world_size() == 1:
        return values[None]
    found = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(found, values)
    return torch.stack(found)


def is_spread(weight: Tensor | None) -> bool:
    """Whether this process holds a part of a weight alone, as a ``DTensor`` of FSDP2 or in ZeRO-3's own form."""
    return isinstance(weight, DTensor) or (hasattr(weight, "ds_id") and hasattr(weight, "ds_shape"))


def whole(weight: Tensor) -> Tensor:
    """A weight's values, fetched from all processes where each has a part of them; all of them call it then."""
    if isinstance(weight, DTensor):
        held: Tensor = weight.full_tensor()
        return held.detach()
    if not is_spread(weight):
        return weight.detach()
    from deepspeed import zero

    with zero.GatheredParameters([weight]):
        return weight.detach().clone()


def held_whole(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of a model without its weights that are spread, for what writes an adapter; None where none is.

    PEFT would fetch all weights of the base else, to write none of them.
    """
    state: dict[str, Tensor] = model.state_dict()
    found = {name: value for name, value in state.items() if not is_spread(value)}
    return None if len(found) == len(state) else found
