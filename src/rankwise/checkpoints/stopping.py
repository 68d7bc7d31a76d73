"""Asking a training to end: it saves a checkpoint first, so that the same command goes on from there."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import Stopped
from rankwise.processes import any_of

GRACE = 25.0  # seconds from the request after which the training ends, if it has not begun to save by then
SHARE = 0.05  # of the time, at most, is spent on checkpoints
TOGETHER = 2.0  # seconds in which a signal that comes again is the same one: to the group, and from the parent
SIGNALS = ("SIGTERM", "SIGINT")


class StopRequest:
    """Whether the process was asked to end, by SIGTERM or by Ctrl-C, while something was watched.

    The first signal is a request. After a second one, or where no step has ended after ``GRACE`` seconds, the training
    ends at once.

    Attributes:
        name: of the signal; None where none came.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take signals as requests while the block runs; elsewhere than in the main thread they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in SIGNALS}
        for number in before:
            if before[number] not in (signal.SIG_IGN, None):
                signal.signal(number, self._ask)
        alarm = signal.signal(signal.SIGALRM, self._end) if hasattr(signal, "SIGALRM") else None
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # of a library that is not Python's
                    signal.signal(number, handler)
            self.hold()
            if alarm is not None:
                signal.signal(signal.SIGALRM, alarm)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            if time.monotonic() - self._since > TOGETHER:
                self._end(number, frame)
            return
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def join(self, name: str) -> None:
        """Take part in another process's request: a signal that comes now is the same one."""
        if self.name is None:
            self.name, self._since = name, time.monotonic()

    def _end(self, number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {self.name} within a step: the same command goes on from the last checkpoint")

    def hold(self) -> None:
        """Wait as long as it takes: what was asked for is being done."""
        if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self, where: str, saved: bool) -> None:
        """End here, where a request came.

        Args:
            where: in the training.
            saved: whether there is a checkpoint of it.

        Raises:
            Stopped: it came.
        """
        if self.name is not None:
            kept = ", which is saved: the same command goes on from there"
            kept = kept if saved else ": the same command goes on from the last checkpoint"
            raise Stopped(f"stopped by {self.name} at {where}{kept}")


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises ``Stopped`` while the block runs; elsewhere than in the main thread it stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped by SIGTERM: the same command goes on with what is not finished")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class SaveInTime(TrainerCallback):
    """Has the trainer write a checkpoint every few seconds, and one where it is asked to stop; then the training ends.

    Where writing one takes long, they are further apart: it takes no more than ``SHARE`` of the time.

    Args:
        every: seconds between two; 0 for each step, however long it takes, None for no others than the last.
        stop: the request.
    """

    def __init__(self, every: float | None, stop: StopRequest) -> None:
        self.wanted, self.every, self.stop = every, every, stop
        self.last = self.asked = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook."""
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook; all processes do the same."""
        due = self.every is not None and time.monotonic() - self.last >= self.every
        due, stop = any_of(args.device, due, self.stop.name is not None)
        if stop:
            self.stop.join("a signal to another process")
            self.stop.hold()
        self.asked = time.monotonic()
        control.should_save |= stop or (due and state.global_step < state.max_steps)
        control.should_training_stop |= stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: the time that saving takes is not counted."""
        self.last = time.monotonic()
        if self.wanted:
            self.every = max(self.wanted, (self.last - self.asked) / SHARE)
