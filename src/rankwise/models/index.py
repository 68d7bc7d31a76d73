"""Where the weights of a checkpoint are: its index, where they are in several files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.errors import UserError, shown
from rankwise.reading import is_file_name, read_json

# Of what a config counts, by its name: the most that a model has, or little more.
MOST = {r"(^|_)(layers?|groups|group_num|networks)$": 2**10, r"(^|_)experts$": 2**16, "^num_labels$": 2**20}
NAMED = ("label2id", "id2label", "task_specific_params")  # of a config: dicts whose names are the user's
INDEX = "model.safetensors.index.json"
ELSEWHERE = "transformers_weights"  # in a config.json: the name of another file of weights, of any form


def read_index(folder: Path) -> dict[str, str]:
    """The file of each weight, by the weight's name; empty where the folder has no index.

    Raises:
        UserError: it is no index, or names a file outside of its folder; or the configuration has the weights read from
            files of other names, which may be pickles or indices of others' folders.
    """
    check_config(folder)
    path = folder / INDEX
    if not path.is_file():
        return {}
    again = "fetch the file again"
    files = read_json(path, dict, again).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} is no index of weights, it has no weight_map: {again}")
    if stray := [name for name in files.values() if not is_file_name(name)]:
        raise UserError(f"{path}: {shown(stray[0])} is no file of this folder: {again}")
    if other := [name for name in files.values() if not name.endswith(".safetensors")]:
        raise UserError(f"{path}: {shown(other[0])} is no safetensors file: save the model again with save_pretrained")
    return files


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
            f"remove it, and name the weights model.safetensors or {INDEX}"
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
