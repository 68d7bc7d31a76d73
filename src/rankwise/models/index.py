"""Where the weights of a checkpoint are: its index, where they are in several files."""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import UserError, shown
from rankwise.reading import is_file_name, read_json

INDEX = "model.safetensors.index.json"
ELSEWHERE = "transformers_weights"  # in a config.json: the name of another file of weights, of any form


def read_index(folder: Path) -> dict[str, str]:
    """The file of each weight, by the weight's name; empty where the folder has no index.

    Raises:
        UserError: it is no index, or names a file outside of its folder; or the configuration has the weights read from
            files of other names, which may be pickles or indices of others' folders.
    """
    _check_config(folder / "config.json")
    path = folder / INDEX
    if not path.is_file():
        return {}
    again = "fetch the file again"
    files = read_json(path, dict, again).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} is no index of weights, it has no weight_map: {again}")
    if stray := [name for name in files.values() if not is_file_name(name)]:
        raise UserError(f"{path}: {shown(stray[0])} is no file of this folder: {again}")
    return files


def _check_config(path: Path) -> None:
    if not path.is_file():
        return
    config = read_json(path, dict, "fetch the file again")
    if ELSEWHERE in config:
        raise UserError(
            f"{path} has {ELSEWHERE} {shown(config[ELSEWHERE])}, by which files of any name and form could be read: "
            f"remove it, and name the weights model.safetensors or {INDEX}"
        )
