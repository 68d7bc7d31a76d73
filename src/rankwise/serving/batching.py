"""Requests that wait are answered together: one thread runs the model, on as many histories as fit a batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


class Busy(Exception):
    """As many requests wait as may."""


@dataclass
class _Job:
    key: Hashable
    item: Any
    future: asyncio.Future[Any]


class Batcher:
    """Answers items in batches, the first that came first.

    Args:
        work: answers items of one key, in their order; it runs in a thread of its own.
        batch: items at a time, at most.
        queue: items that may wait.
        seen: is told the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[Any, Sequence[Any]], Sequence[Any]],
        batch: int,
        queue: int,
        seen: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._work, self._batch, self._queue, self._seen = work, batch, queue, seen
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def __len__(self) -> int:
        return len(self._waiting)

    async def submit(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        """The answers to some items, all of them taken or none.

        Raises:
            Busy: too many items wait.
        """
        self._waiting = self._alive()
        if self._waiting and len(self._waiting) + len(items) > self._queue:
            raise Busy
        jobs = [_Job(key, item, asyncio.get_running_loop().create_future()) for item in items]
        self._waiting.extend(jobs)
        self._wake.set()
        return list(await asyncio.gather(*(job.future for job in jobs)))

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while jobs := self._take():
                    await self._answer(jobs)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _alive(self) -> deque[_Job]:
        """Those that wait, without those whose clients have given up."""
        return deque(job for job in self._waiting if not job.future.done())

    def _take(self) -> list[_Job]:
        """The first that waits, and those behind it that can be answered together with it."""
        alive = self._alive()
        taken = [job for job in alive if job.key == alive[0].key][: self._batch]
        chosen = set(map(id, taken))
        self._waiting = deque(job for job in alive if id(job) not in chosen)
        return taken

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        self._seen(len(jobs))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._work, jobs[0].key, [job.item for job in jobs])
        except Exception as error:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
            return
        for job, answer in zip(jobs, found, strict=True):
            if not job.future.done():
                job.future.set_result(answer)
