"""A connection to the server: one too many is told so and closed, and one on which nobody asks is closed."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10  # for the head of a request, from the connection or from the answer before it
FULL = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    f"retry-after: {HEAD_SECONDS}\r\n\r\n"
    f'{{"detail":"too many connections: try again in {HEAD_SECONDS} s"}}'
).encode()


class Connection(H11Protocol):
    """uvicorn's own, which would wait for ever for a request that nobody makes, or that comes byte by byte.

    There may be fewer than ``limit_concurrency`` of uvicorn's config.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it."""
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) >= (self.limit_concurrency or float("inf")):
            self.connections.discard(self)
            transport.write(FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._head.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has come; once that is a whole head, its request has a time of its own."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may have come already."""
        self._expect_head()
        super().on_response_complete()

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
