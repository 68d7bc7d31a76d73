"""Requests a second and their times, by how many clients ask at once; batches against one request at a time.

    python benchmarks/bench_serving.py RUN
    python benchmarks/bench_serving.py RUN --soak 60

RUN is the folder of a finished run on interactions (``rankwise train``). Each server is a process of its own
(``rankwise serve``); clients are threads of this one, each asking for the ten best titles of one user after the other.
A soak keeps 32 clients busy for so many seconds, watches the server's memory, and stops it with SIGTERM while requests
are in flight: each that was taken has to be answered.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from rankwise.recommend.store import STORE, read_store
from timing import machine, table

CLIENTS = (1, 8, 32)
BATCHES = (1, 16)
Answer = tuple[int, float]  # status (0 where the connection failed), seconds


class Server(NamedTuple):
    """A process and its address."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def serving(run: str, batch: int, threads: int, stage: list[str]) -> Iterator[Server]:
    """A server that is ready."""
    command = [sys.executable, "-m", "rankwise.cli", "serve", run, "--port", "0", "--batch", str(batch)]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": str(threads)}
    command += ["--stage", *stage] if stage else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving: "))
        yield Server(process, line.split()[1])
        if process.poll() is None:
            process.terminate()


class Clients:
    """Threads that ask until told to stop."""

    def __init__(self, url: str, users: list[str]) -> None:
        self.url, self.users, self.stop = url, itertools.cycle(users), threading.Event()
        self.lock, self.answers = threading.Lock(), list[Answer]()

    def ask(self, client: httpx.Client) -> Answer:
        with self.lock:
            user = next(self.users)
        begun = time.perf_counter()
        try:
            status = client.post("/recommend", json={"user": user}).status_code
        except httpx.TransportError:
            status = 0
        return status, time.perf_counter() - begun

    def _one(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.stop.is_set():
                answer = self.ask(client)
                with self.lock:
                    self.answers.append(answer)
                if not answer[0]:
                    return

    @contextmanager
    def asking(self, count: int) -> Iterator[None]:
        """So many threads meanwhile; each finishes the request that it is at."""
        with ThreadPoolExecutor(count) as pool:
            for _ in range(count):
                pool.submit(self._one)
            try:
                yield
            finally:
                self.stop.set()


def measured(server: Server, users: list[str], count: int, seconds: float) -> list[str]:
    """Cells of a row: clients, requests a second, their times, and what was not answered with 200."""
    clients = Clients(server.url, users)
    begun = time.perf_counter()
    with clients.asking(count):
        time.sleep(seconds)
    lasted = time.perf_counter() - begun
    times = sorted(taken for _, taken in clients.answers)
    p50, p95 = statistics.median(times), times[min(len(times) - 1, int(0.95 * len(times)))]
    bad = sum(status != 200 for status, _ in clients.answers)
    return [str(count), f"{len(times) / lasted:.2f}", f"{p50:.2f} s", f"{p95:.2f} s", str(len(times)), str(bad)]


def soak(run: str, users: list[str], seconds: float, threads: int, stage: list[str]) -> None:
    """Print what became of a server under 32 clients, and of its memory."""
    with serving(run, 16, threads, stage) as server:
        memory: list[float] = []
        clients = Clients(server.url, users)
        with clients.asking(32):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(5.0, seconds / 6))
                memory.append(psutil.Process(server.process.pid).memory_info().rss / 2**20)
            answered = len(clients.answers)
            server.process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            code = server.process.wait(120)
        counts = Counter(status for status, _ in clients.answers[:answered])
        late = Counter(status for status, _ in clients.answers[answered:])
        print(f"32 clients for {seconds:.0f} s: {answered} requests, by status {dict(counts)}")
        print(f"memory: {memory[0]:.0f} MiB at first, {memory[-1]:.0f} at the end, {max(memory):.0f} at most")
        print(f"SIGTERM with 32 requests in flight: by status {dict(late)} (0: not taken any more)")
        print(f"it ended after {time.monotonic() - stopped:.1f} s with code {code}")


def main() -> None:
    """Print a table, or what a soak found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run on interactions")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (%(default)s)")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="keep one server busy so long instead")
    parser.add_argument("--threads", type=int, default=2, help="of the server's torch (%(default)s)")
    parser.add_argument("--stage", nargs="+", default=[], help="whose models are loaded; the last one answers (all)")
    options = parser.parse_args()
    users = read_store(Path(options.run) / STORE).histories["user"].to_list()
    print(machine(options.threads))
    if options.soak:
        soak(options.run, users, options.soak, options.threads, options.stage)
        return
    rows = []
    for batch in BATCHES:
        with serving(options.run, batch, options.threads, options.stage) as server:
            measured(server, users, 1, 3.0)  # warm
            for count in CLIENTS:
                rows.append([str(batch), *measured(server, users, count, options.seconds)])
    print(f"the ten best titles; {options.seconds:.0f} s each\n")
    print(table(["batch", "clients", "requests a second", "p50", "p95", "requests", "not answered"], rows))


if __name__ == "__main__":
    main()
