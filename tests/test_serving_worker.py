"""The worker: what waits is answered together, only so much may wait, and one failure is not another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from rankwise.errors import UserError
from rankwise.recommend.recommender import Ranking, Recommendation
from rankwise.serving.worker import Busy, Question, Worker

QUESTION = Question("sft", ("fox",))


class Gated:
    """Answers with the history itself, one call for each time that it is let go on."""

    def __init__(self) -> None:
        self.calls: list[list[Question]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, questions: Sequence[Question]) -> list[Ranking]:
        self.calls.append(list(questions))
        self.begun.release()
        assert self.go.acquire(timeout=60)
        if any("bad" in one.history for one in questions):
            raise UserError("a bad history")
        return [ranking(one) for one in questions]


def ranking(question: Question) -> Ranking:
    return Ranking([Recommendation(title, 0.0, []) for title in question.history], True, 0)


def asked(title: str, **changes: Any) -> Question:
    return replace(QUESTION, history=(title,), **changes)


def titles(answer: Future[Ranking]) -> list[str]:
    return [one.title for one in answer.result(timeout=60).best]


@pytest.fixture
def model() -> Gated:
    return Gated()


@pytest.fixture
def sizes() -> list[int]:
    return []


@pytest.fixture
def worker(model: Gated, sizes: list[int]) -> Iterator[Worker]:
    made = Worker(model, batch=3, queue=5, seen=sizes.append)
    made.start()
    yield made
    for _ in range(100):
        model.go.release()
    made.stop(60.0)


def occupy(worker: Worker, model: Gated, title: str = "first") -> Future[Ranking]:
    """Have the model busy with one question."""
    answer = worker.submit(asked(title))
    assert model.begun.acquire(timeout=60)
    return answer


def test_what_waits_is_answered_together_up_to_the_limit(worker: Worker, model: Gated, sizes: list[int]) -> None:
    first = occupy(worker, model)
    others = [worker.submit(asked(str(number))) for number in range(5)]
    assert worker.waiting == 5
    for _ in range(3):
        model.go.release()
    assert titles(first) == ["first"]
    assert [titles(one) for one in others] == [[str(number)] for number in range(5)]
    assert sizes == [1, 3, 2]
    assert worker.waiting == 0


def test_only_what_differs_in_its_history_alone_is_answered_together(worker: Worker, model: Gated) -> None:
    occupy(worker, model)
    kinds: list[dict[str, Any]] = [{}, {"stage": "dpo"}, {"top": 3}, {}, {"candidates": ("a", "b")}]
    answers = [worker.submit(asked(str(place), **changes)) for place, changes in enumerate(kinds)]
    for _ in range(6):
        model.go.release()
    assert [titles(one) for one in answers] == [[str(place)] for place in range(5)]
    assert [[one.history[0] for one in call] for call in model.calls] == [["first"], ["0", "3"], ["1"], ["2"], ["4"]]


@pytest.mark.parametrize(
    "changes",
    [{"stage": "dpo"}, {"top": 1}, {"exclude_seen": False}, {"length_normalised": True}, {"most_nodes": 4}],
)
def test_every_option_keeps_questions_apart(changes: dict[str, Any]) -> None:
    assert QUESTION.joins(asked("river"))
    assert not QUESTION.joins(asked("river", **changes))
    listed = asked("river", candidates=("a", "b"))
    assert not listed.joins(listed)


def test_one_more_than_may_wait_is_refused_until_one_gives_up(worker: Worker, model: Gated) -> None:
    occupy(worker, model)
    waiting = [worker.submit(asked(str(number))) for number in range(5)]
    with pytest.raises(Busy) as refused:
        worker.submit(asked("one more"))
    assert 1 <= refused.value.seconds <= 60
    assert waiting[2].cancel()
    assert worker.waiting == 4
    last = worker.submit(asked("last"))
    for _ in range(4):
        model.go.release()
    assert titles(last) == ["last"]
    assert "2" not in [one.history[0] for call in model.calls for one in call]


def test_what_fails_is_asked_again_alone(worker: Worker, model: Gated) -> None:
    occupy(worker, model)
    answers = [worker.submit(asked(title)) for title in ("good", "bad", "fine")]
    for _ in range(5):
        model.go.release()
    assert (titles(answers[0]), titles(answers[2])) == (["good"], ["fine"])
    with pytest.raises(UserError, match="a bad history"):
        answers[1].result(timeout=60)
    assert [len(call) for call in model.calls] == [1, 3, 1, 1, 1]
    model.go.release()
    assert titles(worker.submit(asked("later"))) == ["later"]


def test_after_each_call_freed_memory_goes_back(worker: Worker, model: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = threading.Semaphore(0)
    monkeypatch.setattr("rankwise.serving.worker.return_free_memory", returned.release)
    for title in ("good", "bad"):
        answer = occupy(worker, model, title)
        assert not returned.acquire(blocking=False)
        model.go.release()
        assert answer.exception(timeout=60) is None or title == "bad"
        assert returned.acquire(timeout=60)


def test_stopping_gives_up_what_waits_and_ends_what_runs(worker: Worker, model: Gated) -> None:
    first = occupy(worker, model)
    waits = worker.submit(asked("waits"))
    assert worker.alive
    worker.stop(0.0)
    assert not worker.alive and waits.cancelled()
    with pytest.raises(Busy):
        worker.submit(asked("too late"))
    model.go.release()
    assert titles(first) == ["first"]
    worker.stop(60.0)
    assert not worker._thread.is_alive()
