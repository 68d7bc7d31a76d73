"""Work on many machines, by Ray Data: the extra ``cluster``."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankwise.errors import UserError


def check_cluster() -> None:
    """Refuse to work on a cluster without Ray.

    Raises:
        UserError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("work on a cluster needs Ray: pip install 'rankwise[cluster]'")


def over_cluster(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Iterator[Any]:
    """What ``map`` gives, computed by the workers of a Ray cluster: a block of Ray Data for each input.

    The cluster is that of the environment variable ``RAY_ADDRESS``, or one on this machine. All machines see the same
    folders, and have rankwise installed. An error in a worker is raised here.

    Args:
        function: of one input; what it returns is small.
        inputs: whose results come in their order, when all are there.

    Raises:
        UserError: one in a worker.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"place": place, "given": pickle.dumps(given)} for place, given in enumerate(inputs)]
    if not rows:
        return
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = blocks.map(lambda row: {"place": row["place"], "made": _made(function, row["given"])}).take_all()
    for row in sorted(results, key=lambda one: one["place"]):
        made = pickle.loads(row["made"])
        if isinstance(made, UserError):
            raise made
        yield made


def _made(function: Callable[[Any], Any], given: bytes) -> bytes:
    """The result, or the user's mistake, which Ray would bury under its own errors."""
    try:
        return pickle.dumps(function(pickle.loads(given)))
    except UserError as error:
        return pickle.dumps(UserError(str(error)))
