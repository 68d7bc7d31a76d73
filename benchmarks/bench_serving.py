"""`rankwise serve` under load: requests a second and their times, batches against one request at a time; and a soak.

    python benchmarks/bench_serving.py
    python benchmarks/bench_serving.py --soak 60

Both servers are processes of their own, asked in turns by clients in this process, each of which asks again as soon as
it has its answer. Without ``--run`` a run is made first: the embedded model on a synthetic log, barely trained. Its
searches read more of the catalogue than those of a model that knows it.

The soak begins with a warm-up by as many clients, who ask for the users with the longest prompts. Resident memory rises
and falls with every call of the model, whatever the time: so it is read all along, and told for each quarter, with the
server's open files. The soak ends with SIGTERM while every client waits for an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import polars as pl
import psutil
import torch

from rankwise.recommend.store import STORE, Store, read_store
from soaking import Reading, quarters, read
from synthetic_run import make_run
from timing import machine, table

WAYS = {"together": 16, "one at a time": 1}  # --batch
MOMENT = 0.1  # seconds between two readings of a soak's memory
ARRIVAL = 0.2  # seconds that a request has to reach the server before SIGTERM does


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    address: str


@dataclass
class Load:
    """What the clients saw."""

    times: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@contextlib.contextmanager
def served(run: Path, batch: int, log: Path) -> Iterator[Server]:
    words = [sys.executable, "-m", "rankwise.cli", "serve", str(run), "--port", "0"]
    words += ["--batch", str(batch), "--rate", "1e9"]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving ")), None)
        if line is None:
            sys.exit(f"the server did not start: {log.read_text()[-2000:]}")
        yield Server(process, line.rsplit(" ", 1)[1].strip())
    finally:
        process.terminate()
        process.wait(timeout=60)


async def client(address: str, users: list[str], seed: int, load: Load, stop: asyncio.Event) -> None:
    """Ask for one user after the other until ``stop``."""
    generator = random.Random(seed)
    async with httpx2.AsyncClient(base_url=address, timeout=120) as session:
        while not stop.is_set():
            started = time.perf_counter()
            try:
                answer = await session.post("recommend", json={"user": generator.choice(users)})
                load.outcomes[str(answer.status_code)] += 1
            except httpx2.HTTPError as error:
                load.outcomes[type(error).__name__] += 1
                await asyncio.sleep(0.05)
            load.times.append(time.perf_counter() - started)


async def ask(address: str, users: list[str], clients: int, seconds: float) -> Load:
    """What so many clients saw in so many seconds; an answer that is under way at the end is waited for."""
    load, stop = Load(), asyncio.Event()
    started = time.perf_counter()
    tasks = [asyncio.create_task(client(address, users, seed, load, stop)) for seed in range(clients)]
    await asyncio.sleep(seconds)
    stop.set()
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - started
    return load


def compare(run: Path, users: list[str], arguments: argparse.Namespace, folder: Path) -> list[list[str]]:
    """A row of the table for each way and number of clients."""
    found: dict[tuple[int, str], list[Load]] = {}
    with contextlib.ExitStack() as stack:
        logs = {way: folder / f"{batch}.log" for way, batch in WAYS.items()}
        servers = {way: stack.enter_context(served(run, batch, logs[way])) for way, batch in WAYS.items()}
        for server in servers.values():
            asyncio.run(ask(server.address, users, 8, 1.0))  # warm-up
        for clients in arguments.clients:
            for _ in range(arguments.runs):
                for way, server in servers.items():
                    load = asyncio.run(ask(server.address, users, clients, arguments.seconds))
                    found.setdefault((clients, way), []).append(load)
    return [row(clients, way, loads) for (clients, way), loads in found.items()]


def row(clients: int, way: str, loads: list[Load]) -> list[str]:
    rates = [len(load.times) / load.seconds for load in loads]
    times = 1000 * np.concatenate([load.times for load in loads])
    failed = sum(sum(load.outcomes.values()) - load.outcomes["200"] for load in loads)
    rate = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
    return [str(clients), way, rate, *(f"{np.percentile(times, part):.0f} ms" for part in (50, 95)), str(failed)]


def longest_prompts(store: Store, count: int) -> list[str]:
    """So many users, those whose prompts have the most letters of titles."""
    letters = pl.col("titles").list.tail(store.most_history).list.join("").str.len_chars()
    users: list[str] = store.histories.sort(letters, descending=True)["user"].head(count).to_list()
    return users


@dataclass
class Soak:
    """A whole load, readings of the server all along, and what became of the requests in flight at SIGTERM."""

    load: Load
    readings: list[Reading]
    last: Counter[str]


async def soak(server: Server, users: list[str], clients: int, seconds: float) -> Soak:
    load, stop, found = Load(), asyncio.Event(), list[Reading]()
    seen = psutil.Process(server.process.pid)
    started = time.perf_counter()
    tasks = [asyncio.create_task(client(server.address, users, seed, load, stop)) for seed in range(clients)]
    while time.perf_counter() < started + seconds:
        found.append(read(seen, done=len(load.times)))
        await asyncio.sleep(MOMENT)
    stop.set()
    await asyncio.sleep(ARRIVAL)
    before = Counter(load.outcomes)
    server.process.terminate()
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - started
    return Soak(load, found, load.outcomes - before)


def run_soak(run: Path, store: Store, arguments: argparse.Namespace, folder: Path) -> None:
    """Print what a soak came to; exit with 1 where a request failed or the server did not end well."""
    clients, users = arguments.soak_clients, store.histories["user"].to_list()
    with served(run, WAYS["together"], folder / "soak.log") as server:
        warm = asyncio.run(ask(server.address, longest_prompts(store, clients), clients, arguments.warm_up))
        found = asyncio.run(soak(server, users, clients, arguments.soak))
        answered = time.perf_counter()
        code = server.process.wait(timeout=120)
        ended = time.perf_counter() - answered
    load, times = found.load, 1000 * np.array(found.load.times)
    print(f"warm-up of {warm.seconds:.0f} s: {len(warm.times)} requests, {dict(warm.outcomes)}")
    print(f"{clients} clients for {arguments.soak:g} s: {len(times)} requests, {dict(load.outcomes)}")
    print(f"p50 {np.percentile(times, 50):.0f} ms, p95 {np.percentile(times, 95):.0f} ms, longest {times.max():.0f} ms")
    print(f"in flight at SIGTERM: {dict(found.last)}; exit status {code}, {ended:.1f} s after the last answer\n")
    print(quarters(found.readings, "requests"))
    if set(load.outcomes + warm.outcomes) != {"200"} or code != 0:
        sys.exit(1)


def main() -> None:
    """Print the table, or the soak's result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a run (a synthetic one)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="that ask at once (1 8 32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each way and number of clients (%(default)s)")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="soak for so long instead")
    parser.add_argument("--soak-clients", type=int, default=32, help="of the soak (%(default)s)")
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds before the soak (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = arguments.run or make_run(folder)
        store = read_store(run / STORE)
        users: list[str] = store.histories["user"].to_list()
        print(f"{machine(torch.get_num_threads())}; {store.titles.height} titles, {len(users)} users")
        if arguments.soak:
            run_soak(run, store, arguments, folder)
            return
        rows = compare(run, users, arguments, folder)
    print(f"{arguments.runs} runs of {arguments.seconds:g} s of each, in turns: median (least to most) of the rate\n")
    print(table(["clients", "answered", "requests/s", "p50", "p95", "failed"], rows))


if __name__ == "__main__":
    main()
