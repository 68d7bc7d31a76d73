"""Work on many machines, by Ray Data: the extra ``cluster``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rankwise.errors import UserError


def check_cluster() -> None:
    """Refuse to work on a cluster without Ray.

    Raises:
        UserError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("work on a cluster needs Ray: pip install 'rankwise[cluster]'")


def over_cluster(function: Callable[[Any], Any], inputs: Sequence[Any], *, models: bool = False) -> Iterator[Any]:
    """What ``map`` gives, computed by the workers of a Ray cluster: a block of Ray Data for each input.

    The cluster is that of the environment variable ``RAY_ADDRESS``, or one on this machine. All machines see the same
    folders, and have rankwise installed. An error in a worker is raised here.

    Args:
        function: of one input; what it returns is small.
        inputs: whose results come in their order, when all are there.
        models: whether the function runs a model, so that it asks for a GPU where the cluster has any; Ray hides the
            GPUs of a machine from what asks for none.

    Raises:
        UserError: one in a worker.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not inputs:
        return
    given = ray.put(list(inputs))
    blocks = ray.data.range(len(inputs), override_num_blocks=len(inputs))
    gpus = 1 if models and ray.cluster_resources().get("GPU") else None  # type: ignore[no-untyped-call]
    results = blocks.map(partial(_made, function, given), num_gpus=gpus).take_all()
    for row in sorted(results, key=lambda one: one["place"]):
        found: _Made = row["made"]
        if found.error is not None:
            raise UserError(found.error)
        yield found.result


@dataclass(frozen=True)
class _Made:
    """A result, or the user's mistake, which Ray would bury under its own errors."""

    result: Any = None
    error: str | None = None


def _made(function: Callable[[Any], Any], inputs: Any, row: dict[str, Any]) -> dict[str, Any]:
    """A worker's row: its place among the inputs, which are in Ray's store, and what the function makes of it."""
    import ray

    place = int(row["id"])
    try:
        return {"place": place, "made": _Made(function(ray.get(inputs)[place]))}
    except UserError as error:
        return {"place": place, "made": _Made(error=str(error))}
