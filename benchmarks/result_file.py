"""A file of results that several commands may add to: a JSON line with the settings, then one for each finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class ResultFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[Entry]:
        """All lines as they now are: another command may have added some."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def entries(self) -> list[Entry]:
        return self.lines[1:]

    def add(self, entry: Entry) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
