"""The HTTP interface answers what the recommender does, alone and under load, and refuses what makes no sense."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from conftest import seeded_llama
from rankwise.errors import UserError
from rankwise.recommend.recommender import Ranking, Recommender
from rankwise.serving import ServerSettings, create_app
from rankwise.serving.models import Question, Stages, share_weights
from test_recommender import TITLES, USERS, store

LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def stages(tiny_tokenizer: PreTrainedTokenizerFast) -> Stages:
    """Two models over one catalogue."""
    first, second = (seeded_llama(tiny_tokenizer, seed).double() for seed in (0, 1))
    with torch.no_grad():
        second.lm_head.weight.neg_()
    sft = Recommender(first, tiny_tokenizer, store(), 256)
    return Stages("films", {"sft": sft, "softmax-DPO": sft.with_model(second)})


@pytest.fixture
def client(stages: Stages) -> Iterator[TestClient]:
    with TestClient(create_app(stages), base_url=LOCAL) as made:
        yield made


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/recommend", json=body)


def titles(response: Any, stage: int = 0) -> list[str]:
    assert response.status_code == 200, response.text
    return [one["title"] for one in response.json()["rankings"][stage]["recommendations"]]


def test_answers_are_the_recommenders(client: TestClient, stages: Stages) -> None:
    response = ask(client, history=["Red  FOX", "river"], top=4, stages=["sft", "softmax-DPO"])
    body = response.json()
    assert body["history"] == ["red fox", "river"]
    for ranking, recommender in zip(body["rankings"], stages.recommenders.values(), strict=True):
        [expected] = recommender.recommend([["red fox", "river"]], 4)
        assert ranking["recommendations"] == [
            {"title": one.title, "score": pytest.approx(one.score), "items": one.items} for one in expected.best
        ]
    assert titles(response, 0) != titles(response, 1)
    assert [one["stage"] for one in body["rankings"]] == ["sft", "softmax-DPO"]


def test_a_user_of_the_log(client: TestClient, stages: Stages) -> None:
    response = ask(client, user="2")
    assert response.json()["history"] == USERS["2"]
    assert [one["stage"] for one in response.json()["rankings"]] == ["softmax-DPO"]  # the last, where none is named
    assert not set(titles(response)) & set(USERS["2"])
    assert set(titles(ask(client, user="2", exclude_seen=False))) == set(TITLES)


def test_candidates_are_ranked(client: TestClient, stages: Stages) -> None:
    response = ask(client, history=["fox"], candidates=["grey", "something new", "river"])
    expected = stages.recommenders["softmax-DPO"].rank(["fox"], ["grey", "something new", "river"])
    assert titles(response) == [one.title for one in expected.best]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "give either user or history"),
        ({"user": "1", "history": ["fox"]}, 422, "give either user or history"),
        ({"user": "9"}, 404, "user '9' is none of 3 in the log"),
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": ["fxo"]}, 422, "'fxo' is none of the 10 titles; the closest: 'fox'"),
        ({"history": ["fox"] * 201}, 422, "history: List should have at most 200 items"),
        ({"history": ["x" * 1001]}, 422, "history.0: String should have at most 1000 characters"),
        ({"history": ["fox"], "top": 0}, 422, "top: Input should be greater than or equal to 1"),
        ({"history": ["fox"], "top": 101}, 422, "top: Input should be less than or equal to 100"),
        ({"history": ["fox"], "stages": ["dpo"]}, 404, "stage 'dpo' is none of sft, softmax-DPO"),
        ({"history": ["fox"], "candidates": ["a", "a"]}, 422, "give 2 or more, each once"),
        ({"history": TITLES}, 422, "a history has every title of the catalogue"),
        ({"history": ["fox"], "tpo": 3}, 422, "tpo: Extra inputs are not permitted"),
        ({"history": "fox"}, 422, "history: Input should be a valid list"),
    ],
)
def test_what_makes_no_sense_is_refused(client: TestClient, body: dict[str, Any], status: int, message: str) -> None:
    response = ask(client, **body)
    assert response.status_code == status
    assert message in response.json()["detail"]


def test_what_is_no_request_is_refused(client: TestClient) -> None:
    head = {"content-type": "application/json"}
    for content, status in ((b'{"history": ["fox"', 422), (b"\xff\xfe", 422), (b"[" * 30000, 400), (b" " * 70000, 413)):
        response = client.post("/recommend", content=content, headers=head)
        assert response.status_code == status
        assert response.json()["detail"]
    parts = client.post("/recommend", content=(b" " * 1000 for _ in range(70)), headers=head)  # of no stated length
    assert parts.status_code == 413
    assert client.get("/recommend").status_code == 405
    assert client.get("/nothing").status_code == 404


def test_only_under_its_own_name(stages: Stages) -> None:
    """A page elsewhere whose name was made to lead here is not answered."""
    with TestClient(create_app(stages), base_url="http://evil.example") as client:
        assert client.get("/stages").status_code == 400
    settings = ServerSettings(host="0.0.0.0", hosts=("films.example",))
    with TestClient(create_app(stages, settings), base_url="http://films.example") as client:
        assert client.get("/stages").status_code == 200
    with TestClient(create_app(stages, settings), base_url=LOCAL) as client:
        assert client.get("/stages").status_code == 400


def test_the_token_is_wanted(stages: Stages) -> None:
    token = "a secret of 24 characters"
    with TestClient(create_app(stages, ServerSettings(token=token)), base_url=LOCAL) as client:
        for path in ("/", "/page.js", "/docs", "/health"):
            assert client.get(path).status_code == 200
        for path in ("/stages", "/titles?q=fox", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {token}"}).status_code == 200
        refused = ask(client, history=["fox"])
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert token not in client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).text


def test_every_answer_carries_the_headers_of_security(client: TestClient) -> None:
    for path in ("/", "/stages", "/nothing", "/openapi.json"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_titles_as_one_types(client: TestClient) -> None:
    def found(text: str, **more: Any) -> list[str]:
        response = client.get("/titles", params={"q": text, **more})
        assert response.status_code == 200, response.text
        return list(response.json()["titles"])

    assert found("FOX") == ["fox", "red fox", "red fox 2"]
    assert found("riv") == ["river", "the river"]
    assert found("fox", limit=1) == ["fox"]
    assert found("<b>") == ["film <b>"]
    assert found(".*") == found("  ") == []
    assert client.get("/titles", params={"q": ""}).status_code == 422


def test_the_other_pages(client: TestClient) -> None:
    assert client.get("/health").json()["status"] == "ok"
    about = client.get("/stages").json()
    assert about == {"name": "films", "stages": ["sft", "softmax-DPO"], "titles": 10, "users": 3}
    ask(client, history=["fox"])
    text = client.get("/metrics").text
    assert 'rankwise_requests_total{path="/recommend",status="200"} 1.0' in text
    assert "rankwise_batch_size_count 1.0" in text
    api = client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/recommend", "/titles", "/stages", "/health", "/metrics"}
    for path in ("/", "/docs"):
        page = client.get(path).text
        assert "http://" not in page and "https://" not in page  # nothing comes from elsewhere


class Slow(Stages):
    """Waits for leave to answer, and notes what it is asked together."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages.name, stages.recommenders)
        self.leave, self.batches = threading.Event(), list[int]()

    def answer(self, key: tuple[str, bool], questions: Sequence[Question]) -> list[Ranking | UserError]:
        assert self.leave.wait(20)
        self.batches.append(len(questions))
        return super().answer(key, questions)


def test_concurrent_requests_get_the_answers_of_single_ones(stages: Stages) -> None:
    slow = Slow(stages)
    histories = [[TITLES[at % 10], TITLES[(at + 3) % 10]] for at in range(32)]
    alone = [stages.recommenders["softmax-DPO"].recommend([history], 3)[0] for history in histories]
    with (
        TestClient(create_app(slow, ServerSettings(batch=8)), base_url=LOCAL) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        asked = [pool.submit(ask, client, history=history, top=3) for history in histories]
        time.sleep(0.5)
        slow.leave.set()
        answers = [one.result() for one in asked]
    for answer, expected in zip(answers, alone, strict=True):
        assert titles(answer) == [one.title for one in expected.best]
    assert sum(slow.batches) == 32 and max(slow.batches) > 1 and max(slow.batches) <= 8


def test_one_bad_question_does_not_spoil_the_others(stages: Stages) -> None:
    questions = [Question(("fox",), 3), Question(tuple(TITLES), 3), Question(("river",), 5)]
    first, second, third = stages.answer(("sft", True), questions)
    assert isinstance(second, UserError)
    assert isinstance(first, Ranking) and isinstance(third, Ranking)
    assert (len(first.best), len(third.best)) == (3, 5)


def test_too_many_and_too_slow(stages: Stages) -> None:
    slow = Slow(stages)
    settings = ServerSettings(queue=2, timeout=1.0)
    with TestClient(create_app(slow, settings), base_url=LOCAL) as client, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, client, history=["fox"]) for _ in range(12)]
        codes = [one.result().status_code for one in asked]
        assert set(codes) == {503, 504}
        busy = next(one.result() for one in asked if one.result().status_code == 503)
        assert busy.headers["retry-after"] == "1"
        slow.leave.set()
        assert ask(client, history=["fox"]).status_code == 200  # who gave up is not answered first
        assert sum(slow.batches) <= 4


def test_a_broken_model_is_a_servers_fault(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = seeded_llama(tiny_tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    broken = Stages("films", {"sft": Recommender(model, tiny_tokenizer, store(), 256)})
    with TestClient(create_app(broken), base_url=LOCAL) as client:
        response = ask(client, history=["fox"])
        assert response.status_code == 500 and "NaN" in response.json()["detail"]


def test_models_share_what_is_equal(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = seeded_llama(tiny_tokenizer), seeded_llama(tiny_tokenizer)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    saved = share_weights(one, other)
    whole = sum(value.nbytes for value in one.parameters())
    assert saved == whole - one.lm_head.weight.nbytes
    assert one.model.embed_tokens.weight.data_ptr() == other.model.embed_tokens.weight.data_ptr()
    assert one.lm_head.weight.data_ptr() != other.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch is 0: give 1 or more"),
        ({"port": 70000}, "port is 70000: give 65535 or less"),
        ({"timeout": 0.0}, "timeout is 0.0: give more than 0 seconds"),
        ({"token": "short"}, "the token has 5 characters: give 16 or more"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServerSettings(**settings)
