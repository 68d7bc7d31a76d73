"""Cells are run once each: in processes here or on a cluster, by as many commands at a time as are started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rankwise.comparing.cells import Cell
from rankwise.errors import UserError
from rankwise.files import write_text
from rankwise.recipes import dump_recipe

BEAT = 20.0  # seconds after which a claim is renewed
STALE = 300.0  # and those after which one that was not is taken over
Told = Callable[[Cell], None]


def run_cells(cells: Sequence[Cell], processes: int, keep: bool, told: Told, cluster: bool = False) -> None:
    """Run what is not finished yet; a cell that another command is running is waited for.

    Args:
        cells: all.
        processes: at a time.
        keep: whether adapters of reported cells are kept.
        told: is called with each cell that is finished, in the order in which they finish.
        cluster: on the Ray cluster of ``RAY_ADDRESS``, or a local one, instead of processes of this machine.

    Raises:
        UserError: a cell's process ended without a result (its log is named).
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
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(partial(_finish, threads=threads), job) for job in jobs]
        try:
            for future, cell in zip(futures, waiting, strict=True):
                future.result()
                told(cell)
        except BaseException:
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


def _finish(job: tuple[str, bool, str], threads: int | None = None) -> None:
    """Run a cell in a process of its own, unless it is finished; waits where another command is at it.

    Args:
        job: the cell's recipe, whether its adapters are kept, and the folder from which the recipe's paths are taken.
        threads: of the process; as they are where None.
    """
    recipe, keep, folder = Path(job[0]), job[1], Path(job[2])
    result = recipe.with_suffix("").with_name(recipe.name.removesuffix(".yaml") + ".json")
    while not result.is_file():
        with _claimed(recipe.with_name(recipe.name + ".claim")) as claim:
            if claim is None:
                time.sleep(1.0)
            elif not result.is_file():
                in_a_process(recipe, keep, threads, claim, folder)
                if not result.is_file():
                    log = _log(recipe)
                    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["it says nothing"]
                    raise UserError(f"the run of {recipe} ended without a result: {last[0][:300]} (all of it: {log})")


def in_a_process(recipe: Path, keep: bool, threads: int | None, claim: Path, folder: Path) -> None:
    """Run it, and let the claim name the process that does: it outlives this one, where this one is killed."""
    words = [sys.executable, "-m", "rankwise.comparing.cell_run", str(recipe), *(["--keep"] if keep else [])]
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with _log(recipe).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        claim.write_text(_owner(process.pid), encoding="utf-8")
        try:
            while True:
                try:
                    process.wait(timeout=BEAT)
                    return
                except subprocess.TimeoutExpired:
                    claim.touch()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _log(recipe: Path) -> Path:
    return recipe.with_name(recipe.name.removesuffix(".yaml") + ".log")


@contextmanager
def _claimed(path: Path) -> Iterator[Path | None]:
    """A file that says who runs a cell; None where another one that is alive does."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_owner(os.getpid()))
    except FileExistsError:
        if _is_alive(path):
            yield None
            return
        path.unlink(missing_ok=True)
        yield None  # the next try takes it, or another command does
        return
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _owner(process: int) -> str:
    return f"{socket.gethostname()} {process}"


def _is_alive(path: Path) -> bool:
    """Whether a claim was renewed lately, and its process, where it is of this machine, runs."""
    try:
        host, _, number = path.read_text(encoding="utf-8").rpartition(" ")
        if time.time() - path.stat().st_mtime > STALE:
            return False
    except FileNotFoundError:
        return False
    if host != socket.gethostname() or not number.isdigit():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
