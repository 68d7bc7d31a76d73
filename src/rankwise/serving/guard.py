"""What a request passes before it is read: its size, its token; and what every answer carries."""

from __future__ import annotations

import hmac
import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = {"/", "/docs", "/health", "/page.js", "/page.css", "/docs.js"}  # without a token: they tell nothing of the data
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Answers 401 without the token and 413 to bodies that are too large; adds the headers of ``SECURITY``.

    Args:
        app: what the requests go on to.
        token: None for none.
        body: bytes, at most.
    """

    def __init__(self, app: ASGIApp, token: str | None, body: int) -> None:
        self.app, self.body = app, body
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        headers = Headers(scope=scope)
        given = headers.get("authorization", "").encode()
        if self.expected and scope["path"] not in OPEN and not hmac.compare_digest(given, self.expected):
            await _refuse(secured, 401, "this server wants its token: send Authorization: Bearer TOKEN")
            return
        body = await _read(receive, self.body)
        if body is None:
            await _refuse(secured, 413, f"the request has more than {self.body} bytes")
            return
        await self.app(scope, _replay(body, receive), secured)


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body; None where it is larger, or the client is gone."""
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts += message.get("body", b"")
        if len(parts) > most:
            return None
        if not message.get("more_body"):
            return bytes(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the client does next."""
    parts = [body]

    async def replayed() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replayed


async def _refuse(send: Send, status: int, detail: str) -> None:
    content = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
