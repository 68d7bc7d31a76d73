"""What a model's config.json may say: it is read before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.errors import UserError, shown
from rankwise.reading import read_json

ELSEWHERE = "transformers_weights"  # in a config.json: the name of another file of weights, of any form
# Of what a config counts, by its name: the most that a model has, or little more.
MOST = {r"(^|_)(layers?|groups|group_num|networks)$": 2**10, r"(^|_)experts$": 2**16, "^num_labels$": 2**20}
NAMED = ("label2id", "id2label", "task_specific_params")  # of a config: dicts whose names are the user's


def check_config(folder: Path) -> None:
    """See that a folder's ``config.json``, if it has one, names no files, and counts no more parts than models have.

    To make a configuration or a model takes time and memory for each of them, before any weight is read.

    Raises:
        UserError: it does, or is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path, dict, "fetch the file again")
    if ELSEWHERE in config:
        raise UserError(
            f"{path} has {ELSEWHERE} {shown(config[ELSEWHERE])}, by which files of any name and form could be read: "
            "remove it, and save the weights again with save_pretrained"
        )
    for name, number in _whole_numbers(config):
        most = next((most for pattern, most in MOST.items() if re.search(pattern, name)), number)
        if number > most:
            raise UserError(f"{path}: {name} {number} is more than any model has ({most}): fetch the file again")


def _whole_numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict) and name not in NAMED:
            yield from _whole_numbers(value)
        elif isinstance(value, int):
            yield name, value
