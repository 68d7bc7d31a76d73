"""The command as a process: it listens, answers what it has taken on after SIGTERM, and ends well."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import httpx2
import pytest

import serving_runs
import small_runs
from rankwise.cli import main
from rankwise.serving.server import serve_run
from rankwise.serving.settings import ServerSettings

SLOW = """
import sys, time
from rankwise.cli import main
from rankwise.recommend.recommender import Recommender
from rankwise.serving import connection

connection.HEAD_SECONDS = {head}
own = Recommender.recommend
def recommend(self, histories, top=10, **options):
    if top == 7:
        print("begun", file=sys.stderr, flush=True)
        time.sleep({seconds})
    if top == 8:
        print("begun", file=sys.stderr, flush=True)
        while True:  # within torch, where the end of the interpreter would abort the process
            own(self, list(histories) * 64, top)
    return own(self, histories, top, **options)
Recommender.recommend = recommend
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_runs.small_run(tmp_path_factory.mktemp("served"), model_folder)


class Served:
    """A server in a process of its own, and the lines that it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self.more = process, list[str](), threading.Condition()
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.more:
                self.lines.append(line)
                self.more.notify_all()

    def wait_for(self, pattern: str) -> str:
        """What the first group of a line has, or the whole of it."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self.more:
            assert self.more.wait_for(found, timeout=120), "".join(self.lines)
            match = found()
        assert match is not None
        return match.group(match.lastindex or 0)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, top: int) -> tuple[int, str]:
        address = f"http://127.0.0.1:{self.port}/recommend"
        answer = httpx2.post(address, json={"user": "u1", "top": top}, timeout=60)
        return answer.status_code, answer.text

    def wait_until_others_wait(self, count: int) -> None:
        """For so many requests beside the one that is answered."""
        for _ in range(600):
            text = httpx2.get(f"http://127.0.0.1:{self.port}/metrics", timeout=60).text
            if f"rankwise_queue_length {count}.0" in text:
                return
            time.sleep(0.01)
        raise AssertionError(text)

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        self.close()
        return code

    def close(self) -> None:
        self._reader.join(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def served(run: Path, *options: str, seconds: float = 2.0, head: float = 10) -> Iterator[Served]:
    command = [sys.executable, "-c", SLOW.format(seconds=seconds, head=head), str(run), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Served(process)
    try:
        server.port = int(server.wait_for(r"http://127\.0\.0\.1:(\d+)/"))
        yield server
    finally:
        process.kill()
        process.wait()
        server.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_in_flight_is_answered_after_a_signal_and_no_new_one(run: Path, number: int) -> None:
    with served(run, "--batch", "1", seconds=1.0) as server:
        answers: list[tuple[int, str]] = []
        idle = server.connect()  # a connection on which nothing is asked does not keep the process
        asking = [threading.Thread(target=lambda: answers.append(server.ask(7))) for _ in range(3)]
        for one in asking:
            one.start()
        server.wait_for("begun")
        server.wait_until_others_wait(2)
        server.process.send_signal(number)
        for _ in range(600):
            try:
                server.connect().close()
                time.sleep(0.01)
            except ConnectionRefusedError:
                break
        assert not answers  # those in flight are still waited for
        for one in asking:
            one.join(timeout=60)
        assert [status for status, _ in answers] == [200] * 3
        assert len(json.loads(answers[0][1])["recommendations"]) == 7
        assert server.end() == 0
        idle.close()
    text = "".join(server.lines)
    assert re.search(r"POST /recommend 200 \d+ ms", text) and "stopped" in text
    assert "Traceback" not in text


def test_what_does_not_end_is_not_waited_for(run: Path) -> None:
    with served(run, "--timeout", "1", seconds=600.0) as server:
        asking = threading.Thread(target=lambda: server.ask(7))
        asking.start()
        server.wait_for("begun")
        server.process.terminate()
        assert server.end() == 0
        asking.join(timeout=60)
    assert "POST /recommend 504" in "".join(server.lines)


def test_what_the_model_is_at_ends_with_the_server(run: Path) -> None:
    with served(run, "--timeout", "1") as server:
        asking = threading.Thread(target=lambda: server.ask(8))
        asking.start()
        server.wait_for("begun")
        server.process.terminate()
        assert server.end() == 0
        asking.join(timeout=60)
    text = "".join(server.lines)
    assert "POST /recommend 504" in text
    assert "Traceback" not in text


def test_a_client_that_leaves_is_forgotten(run: Path) -> None:
    with served(run, "--batch", "1") as server:
        first = threading.Thread(target=lambda: server.ask(7))
        first.start()
        server.wait_for("begun")
        body = b'{"user": "u2", "top": 7}'
        with server.connect() as leaving:
            head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            for _ in range(600):
                if "rankwise_queue_length 1.0" in httpx2.get(f"http://127.0.0.1:{server.port}/metrics").text:
                    break
            else:
                raise AssertionError("it never waited")
        server.wait_for("POST /recommend 499")
        first.join(timeout=60)
        assert server.ask(3)[0] == 200
        assert "".join(server.lines).count("begun") == 1
        server.process.terminate()
        assert server.end() == 0


# Connections


def wait_until_closed(connection: socket.socket) -> None:
    """Read what is left, until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1024):
            pass


def test_connections_on_which_nobody_asks_are_closed(run: Path) -> None:
    with served(run, head=1) as server:
        silent, slow, done = server.connect(), server.connect(), server.connect()
        done.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n")
        assert done.recv(4096).startswith(b"HTTP/1.1 200")
        asked = threading.Thread(target=lambda: server.ask(7))  # for longer than a head may take
        asked.start()
        with contextlib.suppress(OSError):
            for letter in b"GET /health HTTP/1.1":
                slow.sendall(bytes([letter]))
                time.sleep(0.1)
        for one in (silent, slow, done):
            wait_until_closed(one)
        asked.join(timeout=60)
        server.wait_for("POST /recommend 200")
        for one in (silent, slow, done):
            one.close()


def test_more_connections_than_there_may_be_are_told_so(run: Path) -> None:
    with served(run, "--batch", "1", "--queue", "1") as server:  # 132
        idle = [server.connect() for _ in range(131)]
        with server.connect() as refused:
            text = b"".join(iter(lambda: refused.recv(4096), b""))
        assert text.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 10\r\n" in text
        assert b'{"detail":"too many connections: try again in 10 s"}' in text
        for one in idle:
            one.close()
        for _ in range(600):
            if httpx2.get(f"http://127.0.0.1:{server.port}/health").status_code == 200:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it never answers again")


def test_a_header_does_not_make_another_address(run: Path) -> None:
    with served(run, "--rate", "0.3") as server:
        address = f"http://127.0.0.1:{server.port}/health"
        answers = [httpx2.get(address, headers={"x-forwarded-for": f"10.0.0.{number}"}) for number in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]


# The benchmark


def test_the_benchmark_compares_and_soaks_to_the_end(run: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_serving.py"

    def output(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, script, "--run", run, *words], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    table = output("--runs", "1", "--seconds", "0.5", "--clients", "1", "4")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in rows[2:]] == [
        [clients, way] for clients in "14" for way in ("together", "one at a time")
    ]
    assert {row[-1] for row in rows[2:]} == {"0"}
    soaked = output("--soak", "2", "--soak-clients", "4", "--warm-up", "0.5")
    assert len(re.findall(r"requests, \{'200': \d+\}", soaked)) == 2 and "exit status 0" in soaked
    lines = [line for line in soaked.splitlines() if re.match(r"\| \d", line)]
    quarters = [list(map(float, re.findall(r"\d+(?:\.\d+)?", line))) for line in lines]
    assert [number for number, *_ in quarters] == [1, 2, 3, 4]
    for _, least, middle, most, fewest, most_files, rate in quarters:
        assert 0 < least <= middle <= most and 0 < fewest <= most_files and rate >= 0


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/run"], "no/run has no recipe.yaml"),
        (["RUN", "--stage", "sftt"], "did you mean 'sft'?"),
        (["RUN", "--host", "0.0.0.0"], "there is no token: give --token-file FILE or set RANKWISE_TOKEN"),
        (["RUN", "--host", "no host"], "there is no token"),
        (["RUN", "--token-file", "no/file"], "--token-file no/file cannot be read"),
        (["RUN", "--batch", "0"], "--batch 0 is not possible"),
        (["RUN", "--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKWISE_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        others = {"RUN": str(run), "TAKEN": str(taken.getsockname()[1])}
        assert main(["serve", *(others.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rankwise: ") and err.count("\n") == 1 and message in err
    assert "serving" not in out


def test_who_reads_the_address_can_connect_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = []

    def read(line: str, **options: object) -> None:
        if line.startswith("serving "):
            port = int(line.rstrip("/").rpartition(":")[2])
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            connected.append(port)

    console = small_runs.silent()
    monkeypatch.setattr(console, "print", read)
    monkeypatch.setattr("rankwise.serving.server._Server", Mock())
    monkeypatch.setattr("rankwise.serving.server._log_to_stderr", Mock())
    serve_run(run, ["base model"], ServerSettings(port=0), console)
    assert len(connected) == 1


def test_without_its_libraries_the_command_says_what_to_install(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rankwise.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(run)]) == 2
    assert "serving needs uvicorn: pip install 'rankwise[serve]'" in capsys.readouterr().err
