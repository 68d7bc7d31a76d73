"""The application: what is asked over HTTP is checked, handed to the worker, and answered in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

import rankwise
from rankwise.errors import UserError
from rankwise.recommend.recommender import Ranking
from rankwise.recommend.store import Store, UnknownTitle
from rankwise.serving.guard import GONE, Guard, Watch
from rankwise.serving.metrics import Metrics
from rankwise.serving.pages import PAGES, add_pages
from rankwise.serving.problems import explain
from rankwise.serving.schema import (
    MOST_CHARACTERS,
    MOST_FOUND,
    Answer,
    Asked,
    FoundTitle,
    FoundTitles,
    Health,
    Problem,
    Recommended,
    ServedStages,
    Stage,
)
from rankwise.serving.settings import ServerSettings
from rankwise.serving.stages import Stages
from rankwise.serving.title_search import TitleSearch
from rankwise.serving.worker import Busy, Question, Worker, answer_together
from rankwise.trees.search import NOT_A_NUMBER

PART = "A part of a title; nothing for the most popular ones."
OPEN = {*PAGES, "/openapi.json", "/health"}  # paths that need no token
logger = logging.getLogger("rankwise.serving")

LAST_CALL = 1.0  # seconds that the model's thread gets to end when the server does
LAST_LAYER = 10.0  # seconds that it gets then to end within a layer: left inside torch, it would abort the process


def create_app(stages: Stages, settings: ServerSettings, name: str = "") -> FastAPI:
    """The application; its worker lives as long as its lifespan.

    Args:
        stages: what recommends.
        settings: of the server; the address is used to check what requests ask for.
        name: of the run, shown to people.
    """
    metrics = Metrics()
    worker = Worker(partial(answer_together, stages), settings.batch, settings.queue, metrics.batch)
    metrics.watch_queue(lambda: worker.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            if not await run_in_threadpool(worker.stop, LAST_CALL):
                stages.give_up()
                if not await run_in_threadpool(worker.stop, LAST_LAYER):
                    logger.warning("the model is still at work: the process may be aborted")

    app = FastAPI(
        title="rankwise",
        version=rankwise.__version__,
        summary="What next for this user, out of a whole catalogue.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_problems(app, settings)
    _add_state(app, stages, worker, metrics, name)
    _add_titles(app, stages.recommender.store, settings)
    _add_recommend(app, stages, worker, settings)
    add_pages(app)
    app.add_middleware(Guard, settings=settings, open_paths=OPEN)
    app.add_middleware(Watch, metrics=metrics, paths={getattr(route, "path", "") for route in app.routes})
    return app


def _add_problems(app: FastAPI, settings: ServerSettings) -> None:
    """What went wrong is answered as one sentence, without the request's own text where that may be long."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse({"detail": explain(error.errors())}, 422)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, UnknownTitle)
        return JSONResponse({"detail": str(error), "closest": error.closest}, 422)

    async def mistaken(request: Request, error: Exception) -> Response:
        if str(error) == NOT_A_NUMBER:
            raise RuntimeError(NOT_A_NUMBER) from error
        return JSONResponse({"detail": str(error)}, 422)

    async def busy(request: Request, error: Exception) -> Response:
        assert isinstance(error, Busy)
        return JSONResponse({"detail": str(error)}, 503, {"retry-after": str(error.seconds)})

    async def late(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": f"no answer within {settings.timeout:g} s: try again later"}, 504)

    app.add_exception_handler(TimeoutError, late)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(UnknownTitle, unknown)
    app.add_exception_handler(UserError, mistaken)
    app.add_exception_handler(Busy, busy)


def _add_state(app: FastAPI, stages: Stages, worker: Worker, metrics: Metrics, name: str) -> None:
    @app.get("/stages", dependencies=TOKEN, responses=_problems(401))
    async def list_stages() -> ServedStages:
        """The stages of the run, and the two to compare."""
        known = [Stage(name=stage, kind=kind) for stage, kind in stages.kinds.items()]
        return ServedStages(run=name, stages=known, before=stages.before, after=stages.after)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether requests are answered."""
        if not worker.alive:
            response.status_code = 503
        return Health(status="ok" if worker.alive else "stopped")

    @app.get("/metrics", dependencies=TOKEN, responses=_problems(401), response_class=Response)
    async def read_metrics() -> Response:
        """Requests by status, times, batches and the queue, in Prometheus's text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_titles(app: FastAPI, store: Store, settings: ServerSettings) -> None:
    search = TitleSearch(store.titles["title"].to_list(), store.titles["popularity"].to_list())

    @app.get("/titles", dependencies=TOKEN, responses=_problems(401, 422, 504))
    async def find_titles(
        q: Annotated[str, Query(max_length=MOST_CHARACTERS, description=PART)] = "",
        limit: Annotated[int, Query(ge=1, le=MOST_FOUND)] = 10,
    ) -> FoundTitles:
        """Titles that fit the letters so far, the likeliest first."""
        async with asyncio.timeout(settings.timeout):
            found = await asyncio.to_thread(search.find, q, limit)
        return FoundTitles(titles=[FoundTitle(title=title, items=store.items[title]) for title in found])


def _add_recommend(app: FastAPI, stages: Stages, worker: Worker, settings: ServerSettings) -> None:
    store = stages.recommender.store
    problems = _problems(401, 404, 413, 422, 504)

    @app.post("/recommend", dependencies=TOKEN, responses=problems, response_model=Answer)
    async def recommend(asked: Asked, request: Request) -> Answer | Response:
        """The best titles after a history, as one stage of the run has it."""
        async with asyncio.timeout(settings.timeout):
            return await _recommend(asked, request)

    async def _recommend(asked: Asked, request: Request) -> Answer | Response:
        stage = asked.stage or stages.after
        stages.check(stage)
        if asked.user is not None and not store.has_user(asked.user):
            return JSONResponse({"detail": f"user {asked.user!r} is not in the log"}, 404)
        history = await asyncio.to_thread(_history, store, asked)  # which goes on, where time is up
        question = Question(
            stage=stage,
            history=tuple(history),
            ratings=() if asked.user is None else tuple(store.ratings(asked.user)),
            candidates=None if asked.candidates is None else tuple(asked.candidates),
            **asked.model_dump(include={"top", "exclude_seen", "length_normalised", "most_nodes"}),
        )
        answer = asyncio.wrap_future(worker.submit(question))
        gone = asyncio.create_task(_client_left(request))
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if answer.cancelled():
                return JSONResponse({"detail": "the server is stopping"}, 503)
            if answer.done():
                return _answer(stage, history, answer.result())
            return Response(status_code=GONE)
        finally:
            answer.cancel()  # where it still waits, the model never sees it
            gone.cancel()


TOKEN = [Security(HTTPBearer(auto_error=False, description="Where the server was given one."))]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (*statuses, 429, 503)}


def _history(store: Store, asked: Asked) -> list[str]:
    return store.find(asked.history) if asked.history is not None else store.history(str(asked.user))


async def _client_left(request: Request) -> None:
    """Comes back when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(stage: str, history: list[str], ranking: Ranking) -> Answer:
    best = [Recommended(title=one.title, score=one.score, items=one.items) for one in ranking.best]
    return Answer(stage=stage, exact=ranking.exact, history=history, recommendations=best)
