"""The HTTP interface of a recommender."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rankwise import __version__
from rankwise.errors import UserError
from rankwise.recommend.recommender import Ranking
from rankwise.serving.batching import Batcher, Busy
from rankwise.serving.guard import Guard
from rankwise.serving.measures import Measures
from rankwise.serving.messages import (
    Health,
    Problem,
    Recommended,
    RecommendRequest,
    RecommendResponse,
    StageList,
    StageRanking,
    Titles,
)
from rankwise.serving.models import Question, Stages
from rankwise.serving.settings import ServerSettings
from rankwise.serving.typeahead import TypeAhead
from rankwise.trees.search import NOT_A_NUMBER

PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/docs": "docs.html", "/docs.js": "docs.js"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
PROBLEMS: dict[int | str, dict[str, object]] = {code: {"model": Problem} for code in (401, 404, 413, 422, 503, 504)}


def create_app(stages: Stages, settings: ServerSettings | None = None) -> FastAPI:
    """An application that recommends.

    ``POST /recommend``, ``GET /titles?q=``, ``GET /stages``, ``GET /health``, ``GET /metrics`` (for Prometheus),
    ``GET /openapi.json``, ``GET /docs``, and at ``/`` a page to try it on. Errors are ``{"detail": text}``.

    Args:
        stages: recommenders by stage; the last one answers where a request names none.
        settings: limits and the token.
    """
    settings = settings or ServerSettings()
    measures, typeahead = Measures(), TypeAhead(stages.store)
    batcher = Batcher(stages.answer, settings.batch, settings.queue, measures.batches.observe)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    app = FastAPI(
        title=f"rankwise: {stages.name}", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    measures.queue.set_function(lambda: len(batcher))

    @app.middleware("http")
    async def measured(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        route = request.scope.get("route")
        measures.done(getattr(route, "path", "unknown"), response.status_code, time.perf_counter() - started)
        return response

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _in_words(error)}, 422)

    @app.post("/recommend", responses=PROBLEMS)
    async def recommend(wanted: RecommendRequest) -> RecommendResponse:
        """The best titles after a user's history or a given one, for each stage that is wanted."""
        names = wanted.stages or stages.names[-1:]
        if unknown := [name for name in names if name not in stages.names]:
            raise HTTPException(404, f"stage {unknown[0]!r} is none of {', '.join(stages.names)}")
        history = await run_in_threadpool(_history, stages, wanted)
        candidates = tuple(wanted.candidates) if wanted.candidates else None
        question = Question(tuple(history), wanted.top, candidates)
        try:
            async with asyncio.timeout(settings.timeout):
                asked = [batcher.submit((name, wanted.exclude_seen), [question]) for name in names]
                found = [one for [one] in await asyncio.gather(*asked)]
        except Busy:
            raise HTTPException(503, f"{settings.queue} requests wait: try again", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {settings.timeout:g} seconds") from None
        for one in found:
            if isinstance(one, UserError):
                raise HTTPException(500 if str(one) == NOT_A_NUMBER else 422, str(one))
        return RecommendResponse(history=history, rankings=list(map(_ranking, names, found)))

    @app.get("/titles", responses=PROBLEMS)
    async def titles(q: str = Query(min_length=1, max_length=200), limit: int = Query(10, ge=1, le=50)) -> Titles:
        """Titles that a text may mean: those that begin with it first, then the more popular."""
        return Titles(titles=typeahead.find(q, limit))

    @app.get("/stages")
    async def named() -> StageList:
        """The stages of training whose models answer, in their order."""
        store = stages.store
        return StageList(
            name=stages.name, stages=stages.names, titles=store.titles.height, users=store.histories.height
        )

    @app.get("/health")
    async def health() -> Health:
        """Whether the server answers."""
        return Health(status="ok", version=__version__)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, in the form that Prometheus reads."""
        return Response(measures.text(), media_type="text/plain; version=0.0.4")

    for path, name in PAGE.items():
        app.get(path, include_in_schema=False)(_file(name))
    app.add_middleware(Guard, token=settings.token, body=settings.body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.allowed_hosts)
    return app


def _history(stages: Stages, wanted: RecommendRequest) -> list[str]:
    if wanted.user is not None:
        try:
            return stages.store.history(wanted.user)
        except UserError as error:
            raise HTTPException(404, str(error)) from None
    assert wanted.history is not None
    try:
        return stages.store.find(wanted.history)
    except UserError as error:
        raise HTTPException(422, str(error)) from None


def _ranking(stage: str, found: Ranking) -> StageRanking:
    best = [Recommended(title=one.title, score=one.score, items=one.items) for one in found.best]
    return StageRanking(stage=stage, recommendations=best)


def _in_words(error: RequestValidationError) -> str:
    """The first thing that is wrong, and where; what was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    content = files("rankwise.serving").joinpath("page", name).read_bytes()

    async def sent() -> Response:
        return Response(content, media_type=TYPES[name.rpartition(".")[2]])

    return sent
