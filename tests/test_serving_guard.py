"""What is refused before the application sees it, limits of time and number, and what an answer carries."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import polars as pl
import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

import serving_runs
from conftest import seeded_llama
from rankwise.errors import UserError
from rankwise.recommend.prompts import load_template
from rankwise.recommend.recommender import Recommender
from rankwise.recommend.store import Store
from rankwise.run import BASE
from rankwise.serving.guard import Guard
from rankwise.serving.pages import PAGES
from rankwise.serving.rate import Rate
from rankwise.serving.settings import MOST_BODY, ServerSettings, read_token
from rankwise.serving.stages import Stages
from rankwise.serving.title_search import TitleSearch

TITLES = ["fox", "red fox", "river", "the river", "a dog"]
TOKEN = "a-token-of-26-letters-long"
ASKED = {"history": ["fox"], "top": 2}


@pytest.fixture
def stages(tiny_tokenizer: PreTrainedTokenizerFast) -> Stages:
    """The base model alone."""
    titles = pl.DataFrame({"title": TITLES}).with_columns(popularity=pl.lit(1), items=pl.concat_list("title"))
    histories = pl.DataFrame({"user": ["1"], "titles": [["fox"]]})
    store = Store(titles, histories, load_template("films"), most_history=3)
    return Stages(Recommender(seeded_llama(tiny_tokenizer), tiny_tokenizer, store, 256), {BASE: "base"}, {})


class Held:
    """The stages' recommender, which answers when it is let go on."""

    def __init__(self, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
        self.histories: list[str] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        own = stages.recommender.recommend

        def recommend(histories: Any, *options: Any, **named: Any) -> Any:
            self.histories += [history[0] for history in histories]
            self.begun.release()
            assert self.go.acquire(timeout=60)
            return own(histories, *options, **named)

        monkeypatch.setattr(stages.recommender, "recommend", recommend)


@pytest.fixture
def held(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(stages, monkeypatch)
    yield made
    for _ in range(100):
        made.go.release()


# Hosts


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("LocalHost:99", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_only_this_machines_names_are_answered_on_loopback(stages: Stages, host: str, status: int) -> None:
    with serving_runs.client(stages) as client:
        assert client.get("/stages", headers={"host": host}).status_code == status
        assert client.get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("settings", "answered", "refused"),
    [
        ({"hosts": ("Films.example",)}, ["films.example", "FILMS.example:443", "localhost"], ["evil.example"]),
        ({"host": "0.0.0.0", "token": TOKEN, "hosts": ("films.example",)}, ["films.example"], ["localhost", "evil"]),
    ],
)
def test_names_that_are_allowed(
    stages: Stages, settings: dict[str, Any], answered: list[str], refused: list[str]
) -> None:
    with serving_runs.client(stages, **settings) as client:
        for host in answered:
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in refused:
            assert client.get("/health", headers={"host": host}).status_code == 421, host


def test_other_names_are_answered_on_other_addresses(stages: Stages) -> None:
    headers = {"host": "films.example", "authorization": f"Bearer {TOKEN}"}
    with serving_runs.client(stages, headers, host="0.0.0.0", token=TOKEN) as client:
        assert client.get("/stages").status_code == 200


# Tokens


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        ("Bearer", 401),
        ("Bearer \xe9", 401),
        (TOKEN, 401),
        (None, 401),
    ],
)
def test_a_token_is_asked_for(stages: Stages, given: str | None, status: int) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    with serving_runs.client(stages, token=TOKEN) as client:
        answers = [client.get(path, headers=headers) for path in ("/stages", "/titles", "/metrics")]
        answers.append(client.post("/recommend", json=ASKED, headers=headers))
        assert [answer.status_code for answer in answers] == [status] * 4
        assert client.get("/no/such/path", headers=headers).status_code == (404 if status == 200 else 401)
        for path in (*PAGES, "/openapi.json", "/health"):
            assert client.get(path).status_code == 200, path
    if status == 401:
        assert answers[0].headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer TOKEN" in answers[0].json()["detail"]


def test_neither_tokens_nor_what_people_type_are_logged(stages: Stages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rankwise.serving")
    with serving_runs.client(stages, {"authorization": f"Bearer {TOKEN}"}, token=TOKEN) as client:
        client.get("/titles", params={"q": "my private words"})
        client.post("/recommend", json={"history": ["my private words"]})
        client.get("/my/private/words")
    said = [record.getMessage() for record in caplog.records if record.name == "rankwise.serving"]
    assert [line.split(" ")[:3] for line in said] == [
        ["GET", "/titles", "200"],
        ["POST", "/recommend", "422"],
        ["GET", "other", "404"],
    ]
    assert "private" not in " ".join(said) and TOKEN not in " ".join(said)
    assert TOKEN not in repr(ServerSettings(token=TOKEN))


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n", encoding="ascii")
    assert read_token(file, {"RANKWISE_TOKEN": "another"}) == TOKEN
    assert read_token(None, {"RANKWISE_TOKEN": "another"}) == "another"
    assert read_token(None, {}) is None and read_token(None, {"RANKWISE_TOKEN": ""}) is None
    with pytest.raises(UserError, match=r"no/file cannot be read: No such file"):
        read_token(Path("no/file"))
    file.write_text(" \n", encoding="ascii")
    with pytest.raises(UserError, match="is empty"):
        read_token(file)
    file.write_bytes("ü".encode())
    with pytest.raises(UserError, match="is no ASCII text"):
        read_token(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 65536}, "--port 65536 is not possible"),
        ({"batch": 0}, "--batch 0 is not possible"),
        ({"queue": 0}, "--queue 0 is not possible"),
        ({"timeout": 0.0}, "--timeout 0 is not possible"),
        ({"timeout": float("nan")}, "--timeout nan is not possible"),
        ({"rate": 0.0}, "--rate 0 is not possible"),
        ({"rate": float("nan")}, "--rate nan is not possible"),
        ({"token": "short"}, "the token has 5 characters: take 16 or more"),
        ({"token": "sixteen letters with spaces"}, "the token has spaces"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached from other machines, and there is no token"),
        ({"host": "films.example"}, "there is no token"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        ServerSettings(**settings)
    assert "short" not in str(refused.value)


# Bodies


def test_bodies_over_the_limit_are_refused_whether_or_not_they_say_so(stages: Stages) -> None:
    def parts(size: int) -> Iterator[bytes]:
        for _ in range(size // 1024):
            yield b" " * 1024
        yield b'{"history": ["fox"]}'

    json_type = {"content-type": "application/json"}
    with serving_runs.client(stages) as client:
        too_large = b" " * (MOST_BODY + 1)
        assert client.post("/recommend", content=too_large, headers=json_type).status_code == 413
        streamed = client.post("/recommend", content=parts(MOST_BODY), headers=json_type)
        assert streamed.status_code == 413 and f"above {MOST_BODY} bytes" in streamed.json()["detail"]
        assert client.post("/recommend", content=parts(MOST_BODY - 1024), headers=json_type).status_code == 200
        lying = {"content-length": "9" * 400} | json_type
        assert client.post("/recommend", content=b"{}", headers=lying).status_code == 413


# Time and number


def test_more_than_may_wait_are_told_to_come_back(stages: Stages, held: Held) -> None:
    with serving_runs.client(stages, queue=2, batch=1) as client, ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/recommend", json=ASKED)
        assert held.begun.acquire(timeout=60)
        waiting = [pool.submit(client.post, "/recommend", json=ASKED) for _ in range(2)]
        _until(lambda: "rankwise_queue_length 2.0" in client.get("/metrics").text)
        refused = client.post("/recommend", json=ASKED)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "try again in" in refused.json()["detail"]
        for _ in range(3):
            held.go.release()
        assert [one.result(timeout=60).status_code for one in (first, *waiting)] == [200] * 3


def test_what_takes_too_long_is_given_up_and_never_computed(stages: Stages, held: Held) -> None:
    with serving_runs.client(stages, timeout=0.5, batch=1) as client, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(client.post, "/recommend", json=ASKED)
        assert held.begun.acquire(timeout=60)
        waits = client.post("/recommend", json={"history": ["river"]})
        assert (waits.status_code, slow.result(timeout=60).status_code) == (504, 504)
        assert "no answer within 0.5 s" in waits.json()["detail"]
        assert "rankwise_queue_length 0.0" in client.get("/metrics").text
        held.go.release()
        held.go.release()
        assert client.post("/recommend", json={"history": ["a dog"]}).status_code == 200
    assert held.histories == ["fox", "a dog"]


def test_finding_a_title_is_within_the_time_limit(stages: Stages, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    found = threading.Event()
    monkeypatch.setattr(Store, "find", lambda store, names: found.wait(60) and list(names))
    try:
        with serving_runs.client(stages, timeout=0.5) as client:
            answer = client.post("/recommend", json=ASKED)
            assert (answer.status_code, "no answer within 0.5 s" in answer.json()["detail"]) == (504, True)
            assert client.get("/health").status_code == 200
            found.set()
    finally:
        found.set()
    assert held.histories == []


def test_titles_while_typing_are_within_the_time_limit(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    found = threading.Event()
    monkeypatch.setattr(TitleSearch, "find", lambda search, query, limit: found.wait(60) and [])
    try:
        with serving_runs.client(stages, timeout=0.5) as client:
            answer = client.get("/titles", params={"q": "fox"})
            assert (answer.status_code, answer.json()) == (504, {"detail": "no answer within 0.5 s: try again later"})
            found.set()
    finally:
        found.set()


def _until(holds: Any) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about within 30 s")


def test_who_asks_too_often_is_told_to_wait(stages: Stages) -> None:
    with serving_runs.client(stages, rate=0.3) as client:
        assert [client.get(path).status_code for path in ("/", "/health", "/stages")] == [200] * 3
        refused = client.post("/recommend", json=ASKED)
        assert refused.status_code == 429 and refused.headers["connection"] == "close"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert "more than 0.3 requests a second from one address: try again in" in refused.json()["detail"]


def test_requests_are_counted_by_address_and_anew_after_a_while() -> None:
    now = [100.0]
    rate = Rate(0.2, lambda: now[0])
    assert [rate.wait("a") for _ in range(3)] == [0, 0, 10]
    assert rate.wait("b") == 0
    now[0] += 9.5
    assert rate.wait("a") == 1
    now[0] += 0.5
    assert rate.wait("a") == 0
    assert [Rate(0.001).wait("a") for _ in range(2)] == [0, 0]


def test_more_requests_than_are_answered_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.serving.settings.SPARE", 0)

    async def run() -> list[Any]:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await JSONResponse({})(scope, receive, send)

        transport = httpx2.ASGITransport(Guard(slow, ServerSettings(batch=1, queue=1), []))
        async with httpx2.AsyncClient(transport=transport, base_url=serving_runs.ADDRESS) as client:
            held = [asyncio.create_task(client.get("/")) for _ in range(2)]
            await asyncio.sleep(0.1)  # both are inside
            refused = await client.get("/")
            go.set()
            return [refused, *await asyncio.gather(*held), await client.get("/")]

    refused, *answered = asyncio.run(run())
    assert [answer.status_code for answer in (refused, *answered)] == [503, 200, 200, 200]
    assert refused.headers["retry-after"] == "1" and refused.json()["detail"].startswith("too many requests at once")


def test_no_answer_has_the_token(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the model broke")

    monkeypatch.setattr(stages.recommender, "recommend", fail)
    headers = {"authorization": f"Bearer {TOKEN}"}
    wrong = {"authorization": f"Basic {TOKEN}"}
    with serving_runs.client(stages, token=TOKEN) as client:
        answers = [client.post("/recommend", json=ASKED, headers=headers), client.get("/stages", headers=wrong)]
        answers.append(client.post("/recommend", json={"user": TOKEN[:-1], "top": -1}, headers=headers))
        answers += [client.get(path, headers=headers) for path in ("/metrics", "/stages", "/no", "/openapi.json", "/")]
    assert [answer.status_code for answer in answers] == [500, 401, 422, 200, 200, 404, 200, 200]
    assert not [answer for answer in answers if TOKEN in answer.text + str(answer.headers)]


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/%2e%2e/page.css", "/page.css/../../app.py", "//etc/passwd"])
def test_paths_do_not_leave_what_is_served(stages: Stages, path: str) -> None:
    with serving_runs.client(stages) as client:
        assert client.get(httpx2.URL(serving_runs.ADDRESS, raw_path=path.encode())).status_code == 404


# What an answer carries


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/stages", 200), ("GET", "/no", 404), ("POST", "/", 405), ("POST", "/recommend", 422)],
)
def test_every_answer_has_the_headers(stages: Stages, method: str, path: str, status: int) -> None:
    with serving_runs.client(stages) as client:
        answer = client.request(method, path, headers={"origin": "https://evil.example"})
        _check_headers(client, answer, status)
        _check_headers(client, client.request(method, path, headers={"host": "evil.example"}), 421)


def _check_headers(client: TestClient, answer: Any, status: int) -> None:
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_other_sites_may_not_ask(stages: Stages) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    with serving_runs.client(stages) as client:
        answer = client.options("/recommend", headers=headers)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control-")]
