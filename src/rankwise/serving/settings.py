"""How the server listens and what it takes on, checked before anything slow is begun."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.errors import UserError

TOKEN = "RANKWISE_TOKEN"  # of the environment
SHORTEST_TOKEN = 16  # characters
MOST_BODY = 128 * 1024  # bytes
SPARE = 64  # requests that are answered beside those that the model has or that wait for it


@dataclass(frozen=True)
class ServerSettings:
    """How a server listens and what it takes on.

    Attributes:
        host: address to listen on.
        port: to listen on, 0 to 65535; 0 for any that is free.
        token: what requests have to carry as ``Authorization: Bearer``; nothing where it is None. It is needed where
            the address can be reached from other machines.
        batch: most requests that the model answers together.
        queue: most requests that wait; one more is refused.
        timeout: seconds after which a request is given up.
        rate: most requests a second from one address, on average over ten seconds; one more is refused.
        hosts: names by which the server may be asked, beside those of this machine where it listens there: that of a
            reverse proxy, say. Any name where there are none and it listens elsewhere.

    Raises:
        UserError: a value is out of its range, or a token is missing or too weak.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    batch: int = 16
    queue: int = 128
    timeout: float = 30.0
    rate: float = 100.0
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port} is not possible: it must be 0 to 65535")
        for name in ("batch", "queue"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is not possible: it must be 1 or more")
        if not 0 < self.timeout <= 3600:
            raise UserError(f"--timeout {self.timeout:g} is not possible: it must be above 0 and at most 3600 seconds")
        if not self.rate > 0:
            raise UserError(f"--rate {self.rate:g} is not possible: it must be above 0 requests a second")
        if self.token is not None:
            _check_token(self.token)
        elif not self.local:
            raise UserError(
                f"--host {self.host} can be reached from other machines, and there is no token: give --token-file "
                f"FILE or set {TOKEN}"
            )

    @property
    def at_once(self) -> int:
        """Most requests at a time."""
        return self.batch + self.queue + SPARE

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_token(path: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token in a file, else that of the environment's ``RANKWISE_TOKEN``; None where neither is there.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    if path is None:
        return environment.get(TOKEN) or None
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"--token-file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"--token-file {path} is no ASCII text: write one line of letters and digits") from None
    if not token:
        raise UserError(f"--token-file {path} is empty: write a token of {SHORTEST_TOKEN} or more characters in it")
    return token


def _check_token(token: str) -> None:
    """See that a token fits a header and cannot be guessed; it is not named in the message."""
    if not all("!" <= letter <= "~" for letter in token):
        raise UserError("the token has spaces or letters outside ASCII: take letters, digits and signs")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(f"the token has {len(token)} characters: take {SHORTEST_TOKEN} or more")
