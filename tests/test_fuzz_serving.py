"""Bodies and queries that are broken: an answer, or a problem with its reason, never the server's own failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

import serving_runs
from conftest import seeded_llama
from fuzz_mutations import mutated
from rankwise.recommend.prompts import load_template
from rankwise.recommend.recommender import Recommender
from rankwise.recommend.store import Store
from rankwise.serving.schema import MOST_NODES
from rankwise.serving.stages import Stages

BODIES = [
    {"history": ["Heat", "Casino"], "top": 3, "most_nodes": 9, "stage": "sft", "exclude_seen": False},
    {"user": "u1", "candidates": ["Heat", "new"], "length_normalised": True},
]


@pytest.fixture(scope="module")
def client(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[TestClient]:
    titles = pl.DataFrame({"title": ["Casino", "Heat"], "popularity": [1, 2], "items": [["i1"], ["i2"]]})
    users = pl.DataFrame({"user": ["u1"], "titles": [["Heat"]]})
    store = Store(titles, users, load_template("films"), 3)
    recommender = Recommender(seeded_llama(tiny_tokenizer), tiny_tokenizer, store, 256)
    with serving_runs.client(Stages(recommender, {"base model": "base", "sft": "sft"}, {})) as made:
        yield made


def is_answer_or_problem(response: Any) -> None:
    assert response.status_code < 500, response.text
    found = json.loads(response.text)
    if response.status_code >= 400:
        assert isinstance(found["detail"], str) and 0 < len(found["detail"]) < 4000


@pytest.mark.parametrize("body", BODIES)
def test_sound_bodies_are_answered(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/recommend", json=body).status_code == 200


def test_broken_bodies_are_answered_or_refused(client: TestClient) -> None:
    @settings(max_examples=250, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32), st.sampled_from(BODIES))
    def broken(seed: int, body: dict[str, Any]) -> None:
        content = mutated(json.dumps(body).encode(), Random(seed))
        is_answer_or_problem(client.post("/recommend", content=content, headers={"content-type": "application/json"}))

    broken()


def test_broken_queries_are_answered_or_refused(client: TestClient) -> None:
    @settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=600), st.sampled_from(("q", "limit", "other")))
    def broken(value: bytes, name: str) -> None:
        escaped = "".join(f"%{byte:02x}" for byte in value)
        is_answer_or_problem(client.get(f"/titles?{name}={escaped}"))

    broken()


def test_a_search_reads_so_many_tokens_at_most(client: TestClient) -> None:
    """Keys and values of each stay in memory while it is answered."""
    body = {"history": ["Heat"], "most_nodes": MOST_NODES}
    assert client.post("/recommend", json=body).status_code == 200
    refused = client.post("/recommend", json=body | {"most_nodes": MOST_NODES + 1})
    assert refused.status_code == 422 and "most_nodes" in refused.json()["detail"]
