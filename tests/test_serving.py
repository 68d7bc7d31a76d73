"""Every path of the server: what it answers, and what it says to what it cannot answer."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import rankwise as rw
import serving_runs
import small_runs
from rankwise.errors import UserError
from rankwise.recipes import make_recipe
from rankwise.run import BASE, Run
from rankwise.serving.stages import Stages, load_stages
from rankwise.trees.search import NOT_A_NUMBER
from serving_runs import EVIL


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_runs.small_run(tmp_path_factory.mktemp("served"), model_folder)


@pytest.fixture(scope="module")
def stages(run: Path) -> Stages:
    return load_stages(run)


@pytest.fixture(scope="module")
def client(stages: Stages) -> Iterator[TestClient]:
    with serving_runs.client(stages) as made:
        yield made


def history(stages: Stages) -> list[str]:
    return list(stages.recommender.titles[5:8])


# Recommendations


@pytest.mark.parametrize("stage", ["sft", "DPO", "softmax-DPO", None])
def test_recommendations_are_those_of_the_library(run: Path, client: TestClient, stage: str | None) -> None:
    alone = rw.load_recommender(run, stage)
    titles = alone.titles[3:6]
    [expected] = alone.recommend([titles], 5)
    found = client.post("/recommend", json={"history": titles, "stage": stage, "top": 5}).json()
    assert (found["stage"], found["exact"], found["history"]) == (stage or "softmax-DPO", True, titles)
    assert [one["title"] for one in found["recommendations"]] == [one.title for one in expected.best]
    for one, other in zip(found["recommendations"], expected.best, strict=True):
        assert one["items"] == other.items and one["items"]
        assert one["score"] == pytest.approx(other.score, abs=1e-4)


def test_a_history_is_found_by_other_names_and_of_a_user(client: TestClient, stages: Stages) -> None:
    store = stages.recommender.store
    titles = history(stages)
    names = [titles[0].upper(), f"  {titles[1]} ", store.items[titles[2]][0]]
    by_title = client.post("/recommend", json={"history": titles}).json()
    assert client.post("/recommend", json={"history": names}).json() == by_title
    of_user = client.post("/recommend", json={"user": "u1", "stage": BASE}).json()
    assert (of_user["history"], of_user["stage"]) == (store.history("u1"), BASE)


def test_options(client: TestClient, stages: Stages) -> None:
    titles = history(stages)

    def found(**options: Any) -> dict[str, Any]:
        answer = client.post("/recommend", json={"history": titles, "top": 100} | options)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def names(**options: Any) -> list[str]:
        return [one["title"] for one in found(**options)["recommendations"]]

    every = set(stages.recommender.titles)
    assert set(names()) == every - set(titles)
    assert set(names(exclude_seen=False)) == every
    [normalised] = stages.recommender.recommend([titles], 100, length_normalised=True)
    assert names(length_normalised=True) == [one.title for one in normalised.best] != names()
    assert not found(most_nodes=1, top=3)["exact"]
    candidates = [titles[0], "A Film Nobody Knows", *EVIL]
    assert sorted(names(candidates=candidates)) == sorted(candidates)
    assert len(names(candidates=candidates, top=2)) == 2


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({}, 422, "give either history or user"),
        ({"history": ["Curse of the Zombie"], "user": "u1"}, 422, "give either history or user"),
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": [""]}, 422, "history.0: String should have at least 1 character"),
        ({"history": ["x"] * 201}, 422, "history: List should have at most 200 items"),
        ({"history": ["x" * 501]}, 422, "history.0: String should have at most 500 characters"),
        ({"history": "Curse of the Zombie"}, 422, "history: Input should be a valid list"),
        ({"history": ["Curse of the Zombi"]}, 422, "'Curse of the Zombi' is none of the"),
        ({"history": ["\ud800"]}, 422, "history.0: Input should be a valid string"),
        ({"user": "nobody"}, 404, "user 'nobody' is not in the log"),
        ({"user": 77}, 404, "user '77' is not in the log"),
        ({"user": "u1", "stage": "sftt"}, 422, "stage 'sftt' is not served: did you mean 'sft'?"),
        ({"user": "u1", "top": 0}, 422, "top: Input should be greater than or equal to 1"),
        ({"user": "u1", "top": 101}, 422, "top: Input should be less than or equal to 100"),
        ({"user": "u1", "top": True}, 422, "top: Input should be a valid integer"),
        ({"user": "u1", "most_nodes": 0}, 422, "most_nodes: Input should be greater than or equal to 1"),
        ({"user": "u1", "candidates": ["one"]}, 422, "candidates: List should have at least 2 items"),
        ({"user": "u1", "candidates": ["one", "one"]}, 422, "give 2 or more, each once"),
        ({"user": "u1", "candidates": ["one", "film " * 90]}, 422, "tokens"),
        ({"user": "u1", "historie": ["x"]}, 422, "field 'historie' is unknown: did you mean 'history'?"),
        ({"user": "u1", "a": 1, "b": 2, "c": 3, "d": 4}, 422, "and 1 more"),
        (["u1"], 422, "the body must be a JSON object, sent as application/json"),
    ],
)
def test_mistakes_are_told(client: TestClient, asked: Any, status: int, message: str) -> None:
    sent = json.dumps(asked).encode()
    answer = client.post("/recommend", content=sent, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def test_a_history_of_everything_leaves_nothing(client: TestClient, stages: Stages) -> None:
    answer = client.post("/recommend", json={"history": stages.recommender.titles})
    assert answer.status_code == 422 and "nothing is left to recommend" in answer.json()["detail"]


def test_unknown_titles_are_answered_with_the_closest(client: TestClient) -> None:
    answer = client.post("/recommend", json={"history": ["Curse of the Zombi"]}).json()
    assert answer["closest"][0] == "Curse of the Zombie"
    assert "the closest: 'Curse of the Zombie'" in answer["detail"]
    assert client.post("/recommend", json={"history": ["0000000"]}).json()["closest"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"user": "u1",}', "the body is no JSON: "),
        (b"", "the body must be a JSON object"),
        (b"\xff\xfe", "the body"),
        (b"null", "the body must be a JSON object"),
    ],
)
def test_bodies_that_are_no_json(client: TestClient, content: bytes, message: str) -> None:
    answer = client.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["detail"]


def test_json_that_is_too_deep_is_refused(client: TestClient) -> None:
    answer = client.post("/recommend", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "parsing the body" in answer.json()["detail"]


def test_json_that_does_not_say_so_is_refused(client: TestClient) -> None:
    answer = client.post("/recommend", content=b'{"user": "u1"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 422 and "sent as application/json" in answer.json()["detail"]


@pytest.mark.parametrize("error", [RuntimeError("secret words"), UserError(NOT_A_NUMBER)])
def test_an_error_of_the_server_is_no_mistake_of_the_client(
    stages: Stages, error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with serving_runs.client(stages) as client:
        monkeypatch.setattr(stages.recommender, "recommend", fail)
        answer = client.post("/recommend", json={"user": "u1"})
        assert (answer.status_code, answer.json()) == (500, {"detail": "the server failed: its log says why"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "RuntimeError" in caplog.text
        monkeypatch.undo()
        assert client.post("/recommend", json={"user": "u1"}).status_code == 200


# Many at once


def test_many_at_once_are_answered_as_one_after_the_other(client: TestClient, stages: Stages) -> None:
    store, served = stages.recommender.store, list(stages.kinds)
    users = store.histories["user"].to_list()
    asked = [
        {"user": users[number % len(users)], "stage": served[number // 2 % len(served)], "top": 3 + number % 2}
        for number in range(64)
    ]
    apart = [client.post("/recommend", json=one).json() for one in asked]
    gate = threading.Barrier(32)

    def ask(one: dict[str, Any]) -> Any:
        gate.wait(timeout=60)
        return client.post("/recommend", json=one).json()

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, asked))
    for one, other in zip(together, apart, strict=True):
        assert [row["title"] for row in one["recommendations"]] == [row["title"] for row in other["recommendations"]]
        scores = [row["score"] for row in other["recommendations"]]
        assert [row["score"] for row in one["recommendations"]] == pytest.approx(scores, abs=1e-4)
    text = client.get("/metrics").text
    calls, questions = (_metric(text, f"rankwise_batch_size_{part}") for part in ("count", "sum"))
    assert calls < questions  # some of them were answered together


# The other paths


def test_titles_are_found_while_typing(client: TestClient) -> None:
    def found(query: str, **options: int) -> list[str]:
        answer = client.get("/titles", params={"q": query} | options)
        return [one["title"] for one in answer.json()["titles"]]

    assert found("CURSE OF THE z") == ["Curse of the Zombie"]
    assert found("<img") == [EVIL[1]]
    assert found("no such title") == []
    assert len(found("", limit=4)) == 4
    assert client.get("/titles", params={"q": "curse of the zombie"}).json()["titles"][0]["items"]
    for options in ({"limit": 0}, {"limit": 51}, {"q": "x" * 501}):
        answer = client.get("/titles", params=options)
        assert answer.status_code == 422 and next(iter(options)) in answer.json()["detail"]


def test_stages_and_health(client: TestClient) -> None:
    found = client.get("/stages").json()
    kinds = {"base model": "base", "sft": "sft", "DPO": "softmax_dpo", "softmax-DPO": "softmax_dpo"}
    assert {one["name"]: one["kind"] for one in found["stages"]} == kinds
    assert (found["run"], found["before"], found["after"]) == ("small", "sft", "softmax-DPO")
    assert client.get("/health").json() == {"status": "ok"}


def test_health_tells_when_the_server_has_stopped(stages: Stages) -> None:
    with serving_runs.client(stages) as client:
        assert client.get("/health").status_code == 200
    stopped = client.get("/health")
    assert (stopped.status_code, stopped.json()) == (503, {"status": "stopped"})
    assert client.post("/recommend", json={"user": "u1"}).status_code == 503


def _metric(text: str, name: str) -> float:
    [value] = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_metrics_count_by_path_and_status(stages: Stages) -> None:
    with serving_runs.client(stages) as client:
        for user in ("u1", "u2", "nobody"):
            client.post("/recommend", json={"user": user})
        client.get("/wp-admin.php?secret=1")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    assert _metric(text, 'rankwise_requests_total{path="/recommend",status="200"}') == 2
    assert _metric(text, 'rankwise_requests_total{path="/recommend",status="404"}') == 1
    assert _metric(text, 'rankwise_requests_total{path="other",status="404"}') == 1
    assert _metric(text, 'rankwise_request_seconds_count{path="/recommend"}') == 3
    assert _metric(text, "rankwise_batch_size_sum") == 2
    assert _metric(text, "rankwise_queue_length") == 0
    assert "secret" not in text and "wp-admin" not in text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_take_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    for reference in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        assert client.get(f"/{reference.lstrip('./')}").status_code == 200, reference
    for name in ("page.css", "page.js", "picker.js", "server.js", "docs.js"):
        text = client.get(f"/{name}").text
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text
    assert "https:" not in page.text and not re.search(r"<script(?! type=\"module\" src=)|\son\w+=|style=", page.text)


def test_the_interface_describes_itself(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/stages", "/health", "/metrics", "/titles", "/recommend"}
    assert set(described["paths"]["/recommend"]["post"]["responses"]) >= {"200", "404", "413", "422", "503", "504"}
    assert client.get("/redoc").status_code == 404


# Runs whose prompts list the candidates


def test_a_run_whose_prompts_list_candidates_ranks_those_alone(model_folder: Path, tmp_path: Path) -> None:
    values = small_runs.values("interactions", tmp_path, model_folder)
    values["data"]["template"] = "films-candidates"
    values["model"]["context"] = 256
    Run(make_recipe(values), small_runs.silent())()
    stages = load_stages(tmp_path / "run")
    titles = stages.recommender.titles
    expected = rw.load_recommender(tmp_path / "run").rank(titles[4:6], titles[:4])
    with serving_runs.client(stages) as client:
        found = client.post("/recommend", json={"history": titles[4:6], "candidates": titles[:4]}).json()
        assert [one["title"] for one in found["recommendations"]] == [one.title for one in expected.best]
        refused = client.post("/recommend", json={"history": titles[4:6]})
        assert refused.status_code == 422 and "give candidates to rank" in refused.json()["detail"]
