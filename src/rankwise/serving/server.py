"""Listening, and stopping without losing an answer."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from rankwise.errors import UserError
from rankwise.serving.settings import ServerSettings


def listen(app: FastAPI, settings: ServerSettings, ready: Callable[[str], object]) -> None:
    """Serve until SIGTERM or SIGINT: then no request is taken, those in flight are answered, and this returns.

    Requests are not logged: what people have seen is theirs.

    Args:
        app: what answers.
        settings: where to listen, and how long to wait at the end.
        ready: is told the address, once requests are taken.

    Raises:
        UserError: the address cannot be listened at.
    """
    bound = _bind(settings)
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    for number in (signal.SIGTERM, signal.SIGINT):  # the server, once stopped, raises them again
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    ready(f"http://{shown}:{bound.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[bound])


def read_token(path: str | None) -> str | None:
    """The token in a file, or in the variable RANKWISE_TOKEN; None where there is neither.

    Raises:
        UserError: the file cannot be read, or has nothing in it.
    """
    if path is None:
        return os.environ.get("RANKWISE_TOKEN") or None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path} cannot be read: {error}") from error
    if not token:
        raise UserError(f"--token-file {path} is empty: put the token into it")
    return token


def _bind(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host}, port {settings.port}"
        raise UserError(f"cannot listen at {where} ({error.strerror}): give another --host or --port") from error
