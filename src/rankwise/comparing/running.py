"""Cells are run once each: in processes here or on a cluster, by as many commands at a time as are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rankwise.checkpoints.stopping import stopped_by_sigterm
from rankwise.comparing.cells import Cell
from rankwise.errors import UserError, cut
from rankwise.files import is_in_use, write_text
from rankwise.recipes import dump_recipe

BUSY = 75  # the status of a cell's process that finds another one at it
Told = Callable[[Cell], None]


def run_cells(cells: Sequence[Cell], processes: int, keep: bool, told: Told, cluster: bool = False) -> None:
    """Run what is not finished yet; a cell that another command is running is waited for.

    Args:
        cells: all.
        processes: at a time.
        keep: whether adapters of reported cells are kept.
        told: is called with each cell that is finished, in the order in which they finish.
        cluster: on the Ray cluster of ``RAY_ADDRESS``, or a local one, instead of processes of this machine; ``told``
            is called when all are finished.

    Raises:
        UserError: a cell's process ended without a result (its log is named).
        Stopped: SIGTERM came; what was training has saved a checkpoint.
    """
    waiting = []
    for cell in cells:
        if cell.result() is None:
            waiting.append(cell)
        else:
            told(cell)
    here = str(Path.cwd())
    jobs = [(str(_written(cell).resolve()), keep and cell.part == "final", here) for cell in waiting]
    threads = threads_of(processes)
    if cluster:
        from rankwise.recommend.cluster import over_cluster

        for _, cell in zip(over_cluster(_finish, jobs, models=True), waiting, strict=True):
            told(cell)
        return
    children = Children()
    with ThreadPoolExecutor(processes) as pool, stopped_by_sigterm():
        finish = partial(_finish, threads=threads, children=children)
        futures = {pool.submit(finish, job): cell for job, cell in zip(jobs, waiting, strict=True)}
        try:
            for future in as_completed(futures):
                future.result()
                told(futures[future])
        except BaseException:
            children.end()
            pool.shutdown(cancel_futures=True)
            raise


def threads_of(processes: int) -> int | None:
    """Threads of a run where so many go on at a time; None where the environment says it."""
    return None if "OMP_NUM_THREADS" in os.environ else max(1, _processors() // processes)


def _processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _written(cell: Cell) -> Path:
    """The cell's recipe in its file."""
    path = cell.beside(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_recipe(cell.recipe))
    return path


def _finish(job: tuple[str, bool, str], threads: int | None = None, children: Children | None = None) -> None:
    """Run a cell in a process of its own, unless it is finished; waits where another command is at it.

    Args:
        job: the cell's recipe, whether its adapters are kept, and the folder from which the recipe's paths are taken.
        threads: of the process; as they are where None.
        children: knows the process, and ends it.
    """
    recipe, keep, folder = Path(job[0]), job[1], Path(job[2])
    run = recipe.with_name(recipe.name.removesuffix(".yaml"))
    result = run.with_name(run.name + ".json")
    while not result.is_file() and not (children is not None and children.ended):
        if is_in_use(run):
            time.sleep(1.0)
            continue
        log = _log(recipe)
        begin = log.stat().st_size if log.is_file() else 0
        status = in_a_process(recipe, keep, threads, folder, children)
        if not result.is_file() and status != BUSY:
            raise UserError(
                f"the run of {recipe} ended without a result, {ending(status, log, begin)} (all of it: {log})"
            )


def ending(status: int | None, log: Path, begin: int = 0) -> str:
    """How a process ended, in words, and the last line that it logged.

    Args:
        status: of the process; a signal's number, negative, where one ended it.
        log: that it wrote to.
        begin: bytes of the log that were there before it.
    """
    how = f"with status {status}"
    if status is not None and status < 0:
        why = ", perhaps for want of memory" if status == -9 else ""  # Linux kills so where memory is out
        how = f"by signal {-status} ({signal.strsignal(-status)}{why})"
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return f"{how}: {cut(said[-1], 300) if said else 'it said nothing'}"


def in_a_process(
    recipe: Path, keep: bool, threads: int | None, folder: Path, children: Children | None = None
) -> int | None:
    """Run it; returns the process's status. The run's folder is in use meanwhile, also where this process is killed."""
    words = [sys.executable, "-m", "rankwise.comparing.cell_run", str(recipe), *(["--keep"] if keep else [])]
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with _log(recipe).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        with (children or Children()).known(process):
            return process.wait()


def _log(recipe: Path) -> Path:
    return recipe.with_name(recipe.name.removesuffix(".yaml") + ".log")


class Children:
    """Processes that end where this one does: each saves a checkpoint if it trains, and goes on from it next time."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock, self.ended = threading.Lock(), False

    @contextmanager
    def known(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """End the process when :meth:`end` is called, or the block is left, before it has ended by itself."""
        with self._lock:
            self._processes.add(process)
            if self.ended:
                process.terminate()
        try:
            yield
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            with self._lock:
                self._processes.discard(process)

    def end(self) -> None:
        """Ask all to end, and those that begin later."""
        with self._lock:
            self.ended = True
            for process in self._processes:
                process.terminate()
