"""How a server listens, and what it takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_TOKEN = 16  # characters


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where to listen, who may ask, and limits.

    Attributes:
        host: address to listen at; only programs of this machine reach the loopback ones.
        port: 0 for any that is free.
        hosts: names under which the server may be asked, against DNS rebinding; the loopback ones where there are none
            and it listens there, any otherwise.
        token: what a request has to bring as ``Authorization: Bearer TOKEN``; None for nothing.
        batch: histories that the model reads together, at most.
        queue: requests that may wait; more are answered with 503.
        timeout: seconds for an answer, the wait included; then 504. Also how long a stopped server waits for answers.
        body: bytes of a request, at most; more are answered with 413.

    Raises:
        UserError: a value is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    token: str | None = None
    batch: int = 16
    queue: int = 64
    timeout: float = 30.0
    body: int = 65536

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name, least in (("batch", 1), ("queue", 1), ("body", 1024), ("port", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.port > 65535:
            raise UserError(f"port is {self.port}: give 65535 or less")
        if not self.timeout > 0:
            raise UserError(f"timeout is {self.timeout}: give more than 0 seconds")
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii()):
            raise UserError(
                f"the token has {len(self.token)} characters: give {LEAST_TOKEN} or more, all of them ASCII"
            )

    @property
    def allowed_hosts(self) -> list[str]:
        """For the check of a request's ``Host``."""
        if self.hosts:
            return list(self.hosts)
        return [*LOOPBACK, "[::1]"] if self.host in LOOPBACK else ["*"]
