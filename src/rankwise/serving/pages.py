"""The page and what belongs to it, as it is shipped: no part of it comes from another server."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

PAGES = {  # path: file and media type
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/picker.js": ("picker.js", "text/javascript; charset=utf-8"),
    "/server.js": ("server.js", "text/javascript; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}


def add_pages(app: FastAPI) -> None:
    """Serve the page at ``/``, and at ``/docs`` one that shows ``/openapi.json``."""
    folder = resources.files("rankwise.serving") / "static"
    for path, (name, media) in PAGES.items():
        _add(app, path, (folder / name).read_bytes(), media)


def _add(app: FastAPI, path: str, content: bytes, media: str) -> None:
    async def page(request: Request) -> Response:
        return Response(content, media_type=media)

    app.add_route(path, page, methods=["GET"], include_in_schema=False)
