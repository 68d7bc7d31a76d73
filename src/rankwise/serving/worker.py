"""One thread runs the model: what waits for it is answered together, and only so much may wait."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

from rankwise.memory import return_free_memory
from rankwise.recommend.recommender import Ranking
from rankwise.serving.stages import Stages

LONGEST_WAIT = 60  # seconds that a refused client is told to wait at most


@dataclass(frozen=True)
class Question:
    """What to recommend after a history; the options are those of :meth:`Recommender.recommend`."""

    stage: str
    history: tuple[str, ...]
    candidates: tuple[str, ...] | None = None
    top: int = 10
    exclude_seen: bool = True
    length_normalised: bool = False
    most_nodes: int | None = None
    ratings: tuple[float | None, ...] = ()

    def joins(self, other: Question) -> bool:
        """Whether both can go through the model in one call: they differ in their histories alone."""
        return self.candidates is None and replace(self, history=other.history, ratings=other.ratings) == other


def answer_together(stages: Stages, questions: Sequence[Question]) -> list[Ranking]:
    """The answers to questions that join each other, or to a single one."""
    first = questions[0]
    with stages.use(first.stage) as recommender:
        if first.candidates is not None:
            options = {"length_normalised": first.length_normalised}
            return [recommender.rank(first.history, first.candidates, first.top, first.ratings, **options)]
        return recommender.recommend(
            [one.history for one in questions],
            first.top,
            exclude_seen=first.exclude_seen,
            length_normalised=first.length_normalised,
            most_nodes=first.most_nodes,
            ratings=[one.ratings for one in questions],
        )


class Busy(Exception):
    """No more requests may wait.

    Attributes:
        seconds: after which there may be room, 1 or more.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"as many requests wait as may: try again in {seconds} s")


class _Waiting(NamedTuple):
    question: Question
    answer: Future[Ranking]


class Worker:
    """A thread that answers questions in the order in which they come, those that join the first with it.

    Args:
        answer: gives the answers to questions that join each other.
        batch: most questions of a call.
        queue: most questions that wait.
        seen: is told how many questions each call had.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], list[Ranking]],
        batch: int,
        queue: int,
        seen: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._answer, self._batch, self._most, self._seen = answer, batch, queue, seen
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 0.0  # that the last call took
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take nothing more, give up what waits, and wait so long at most for what is being answered.

        Returns:
            Whether that has ended.
        """
        with self._changed:
            self._stopping = True
            for one in self._queue:
                one.answer.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether questions are being answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Questions that wait for the model."""
        with self._changed:
            self._forget_cancelled()
            return len(self._queue)

    def submit(self, question: Question) -> Future[Ranking]:
        """The answer to come; one that is cancelled before the model has it is never computed.

        Raises:
            Busy: as many questions wait as may, or the worker has stopped.
        """
        with self._changed:
            if len(self._queue) >= self._most:
                self._forget_cancelled()
            if len(self._queue) >= self._most or self._stopping:
                calls = len(self._queue) / self._batch + 1
                raise Busy(max(1, min(math.ceil(calls * self._seconds), LONGEST_WAIT)))
            waiting = _Waiting(question, Future())
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.answer

    def _forget_cancelled(self) -> None:
        self._queue = deque(one for one in self._queue if not one.answer.cancelled())

    def _run(self) -> None:
        while taken := self._take():
            self._seen(len(taken))
            started = time.monotonic()
            self._settle(taken)
            return_free_memory()  # or the holes that this call leaves stay beside the next one's tensors
            self._seconds = time.monotonic() - started

    def _take(self) -> list[_Waiting]:
        """The first question with those that join it; none when the worker is to stop."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if self._queue:
                    break
                if self._stopping:
                    return []
                self._changed.wait()
            first = self._queue[0].question
            joining = [one for one in self._queue if one.question is first or one.question.joins(first)]
            taken = joining[: self._batch]
            for one in taken:
                self._queue.remove(one)
        # From here on nobody can cancel them; who did so just now is left out.
        return [one for one in taken if one.answer.set_running_or_notify_cancel()] or self._take()

    def _settle(self, taken: Sequence[_Waiting]) -> None:
        """Answer questions together; where that fails, each alone, so that only those fail which are at fault."""
        try:
            answers = self._answer([one.question for one in taken])
        except Exception as error:
            if len(taken) > 1:
                for one in taken:
                    self._settle([one])
            else:
                taken[0].answer.set_exception(error)
            return
        for one, answer in zip(taken, answers, strict=True):
            one.answer.set_result(answer)
