"""A small run behind the application, for the tests of serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import small_runs
from rankwise.recipes import make_recipe
from rankwise.run import Run
from rankwise.serving.app import create_app
from rankwise.serving.settings import ServerSettings
from rankwise.serving.stages import Stages

ADDRESS = "http://127.0.0.1"
EVIL = ["<script>document.title = 'broken'</script>", "<img src=x onerror=\"document.title = 'broken'\">"]


def small_run(folder: Path, base: Path) -> Path:
    """A run over a small log, two of whose titles are markup."""
    values = small_runs.values("interactions", folder, base)
    items = Path(values["data"]["items"])
    lines = items.read_text(encoding="utf-8").splitlines()
    for place, title in enumerate(EVIL, start=1):
        item, _, genres = lines[place].split(",")
        quoted = title.replace('"', '""')
        lines[place] = f'{item},"{quoted}",{genres}'
    items.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Run(make_recipe(values), small_runs.silent())()
    return folder / "run"


@contextmanager
def client(stages: Stages, headers: dict[str, str] | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of the application; what fails in the server is an answer, as over a network."""
    app = create_app(stages, ServerSettings(**settings), "small")
    with TestClient(app, base_url=ADDRESS, headers=headers, raise_server_exceptions=False) as made:
        yield made
