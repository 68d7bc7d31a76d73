"""The process: it listens, says where, and on SIGTERM answers what it has taken on before it ends."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from rich.console import Console

from rankwise.errors import UserError
from rankwise.saying import say
from rankwise.serving.app import create_app
from rankwise.serving.connection import Connection
from rankwise.serving.settings import ServerSettings
from rankwise.serving.stages import Stages, load_stages

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve_run(run: Path, names: list[str] | None, settings: ServerSettings, console: Console) -> str:
    """Serve a run's stages until SIGTERM or Ctrl-C; returns the address that was served.

    New connections are refused from then on, and what was asked before is answered, for ``settings.timeout`` seconds
    and twelve more at most.

    Raises:
        UserError: the address is taken, or the run cannot be served.
    """
    with _listening(settings) as listener:  # first: a port that is taken is told before the model is loaded
        stages = load_stages(run, names)
        _warm_up(stages)
        address = _address(settings, listener)
        _log_to_stderr()
        for name, number in stages.recommender.counts.items():
            if number:
                say(console, f"  {name}: {number}", dim=True)
        listener.listen()  # who reads the next line may connect at once, and waits until the server runs
        say(console, f"serving {', '.join(stages.kinds)} of {run}: {address}")
        config = uvicorn.Config(
            create_app(stages, settings, run.resolve().name),
            log_config=None,
            log_level="warning",
            access_log=False,  # it would hold what people type
            server_header=False,
            proxy_headers=False,  # a header that says another address would get round the limits
            http=Connection,
            limit_concurrency=2 * settings.at_once,  # connections: some are between two requests
            ws="none",
            timeout_graceful_shutdown=math.ceil(settings.timeout) + 1,
        )
        _Server(config).run(sockets=[listener])
    say(console, "stopped")
    return address


class _Server(uvicorn.Server):
    """A server for which a signal is the usual end: uvicorn's would raise it again, and the process fail by it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that has the address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from error
        yield listener


def _address(settings: ServerSettings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}/"


def _warm_up(stages: Stages) -> None:
    """Build what is made when it is first used, so that no request waits for it."""
    recommender = stages.recommender
    recommender.store.find(recommender.titles[:1])
    recommender.store.has_user("")
    for stage in stages.kinds:
        with stages.use(stage):
            if not recommender.store.template.shows_candidates:
                recommender.recommend([recommender.titles[:1]], 1, exclude_seen=False, most_nodes=1)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("rankwise.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
