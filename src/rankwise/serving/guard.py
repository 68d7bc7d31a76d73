"""What every request passes before the application, and what every answer carries."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankwise.serving.metrics import Metrics
from rankwise.serving.rate import Rate
from rankwise.serving.settings import MOST_BODY, ServerSettings

logger = logging.getLogger("rankwise.serving")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CHALLENGE = {"www-authenticate": "Bearer"}
GONE = 499  # the status, in the metrics, of a request whose client did not wait for the answer
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Watch:
    """Counts and logs each request, and gives its answer the headers; an error becomes a 500 without its text.

    The log has the method, the server's own name of the path, the status and the time: nothing that a client wrote.

    Args:
        app: what answers.
        metrics: where requests are counted.
        paths: that the server has; all others are counted as one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            logger.exception("a request failed")
            if not status:
                await JSONResponse({"detail": "the server failed: its log says why"}, 500)(scope, receive, watched)
        finally:
            self._note(scope, status or GONE, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._metrics.request(path, status, seconds)
        logger.info("%s %s %d %.0f ms", method, path, status, 1000 * seconds)


class Guard:
    """Refuses requests for another host, without the token, with too much in them, too often or too many at once.

    Args:
        app: what answers the others.
        settings: of the server.
        open_paths: that need no token: they tell nothing of the run.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: Collection[str]) -> None:
        self._app, self._settings, self._open = app, settings, frozenset(open_paths)
        own = LOOPBACK if settings.local else ()
        self._hosts = {name.casefold() for name in (*own, settings.host, *settings.hosts)}
        self._any_host = not settings.local and not settings.hosts
        self._rate, self._inside = Rate(settings.rate), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._inside -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._too_much(scope) or self._refusal(scope["path"], headers)
        if refusal is None:
            try:
                async with asyncio.timeout(self._settings.timeout):
                    body = await _body(receive)
            except TimeoutError:
                refusal = _refuse(408, "the request's body did not come in time")
            else:
                if body is None:
                    refusal = TOO_LARGE
                else:
                    receive = _replayed(body, receive)
        await (refusal or self._app)(scope, receive, send)

    def _too_much(self, scope: Scope) -> JSONResponse | None:
        client, _ = scope["client"] or ("", 0)
        if seconds := self._rate.wait(client):
            detail = f"more than {self._settings.rate:g} requests a second from one address: try again in {seconds} s"
            return _refuse(429, detail, {"retry-after": str(seconds)})
        if self._inside > self._settings.at_once:
            return _refuse(503, "too many requests at once: try again in 1 s", {"retry-after": "1"})
        return None

    def _refusal(self, path: str, headers: Mapping[str, str]) -> JSONResponse | None:
        # A page of another site can have its own name lead to this machine; its requests then name that host.
        if not self._any_host and _host_name(headers.get("host", "")) not in self._hosts:
            return _refuse(421, "this server does not answer for the host of this address: see --allow-host")
        if self._settings.token is not None and path not in self._open and not self._authorised(headers):
            return _refuse(401, "a token is needed: send it as 'Authorization: Bearer TOKEN'", CHALLENGE)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > MOST_BODY:
            return TOO_LARGE
        return None

    def _authorised(self, headers: Mapping[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        wanted = (self._settings.token or "").encode()
        return hmac.compare_digest(given.strip().encode("latin-1"), wanted) and kind.casefold() == "bearer"


def _refuse(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # Its body is not read: the connection cannot be used again.
    return JSONResponse({"detail": detail}, status, {"connection": "close", **(headers or {})})


TOO_LARGE = _refuse(413, f"the request's body is above {MOST_BODY} bytes: send fewer or shorter titles")


def _host_name(host: str) -> str:
    """The host of a ``Host`` header, without its port and an address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].casefold()
    return host.partition(":")[0].casefold()


async def _body(receive: Receive) -> list[Message] | None:
    """The messages of a request's body; None where they are too large."""
    messages, size = [], 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if size > MOST_BODY:
            return None
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """Gives the messages that were read, then goes on as before."""
    left = iter(messages)

    async def again() -> Message:
        message: Any = next(left, None)
        return await receive() if message is None else message

    return again


def _add_headers(message: Message) -> None:
    given = {name.lower() for name, _ in message.get("headers", [])}
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in given]
    message["headers"] = [*message.get("headers", []), *added]
