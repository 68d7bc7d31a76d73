"""How often each client asks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

STRETCH = 10  # seconds over which requests are counted, so that a page may load at once what it needs


class Rate:
    """Counts the requests of each client, anew every ten seconds.

    Args:
        most: requests a second of one client, on average over these.
        clock: gives seconds.
    """

    def __init__(self, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = max(most * STRETCH, 1), clock
        self._counts: Counter[str] = Counter()
        self._end = 0.0

    def wait(self, client: str) -> int:
        """Count a request; seconds for which the client has to wait, 0 where the request may pass."""
        now = self._clock()
        if now >= self._end:
            self._counts.clear()
            self._end = now + STRETCH
        self._counts[client] += 1
        return math.ceil(self._end - now) if self._counts[client] > self._most else 0
