"""Where the weights of a checkpoint are: its index, where they are in several files."""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import UserError, shown
from rankwise.models.config import check_config
from rankwise.reading import is_file_name, read_json

INDEX = "model.safetensors.index.json"


def read_index(folder: Path) -> dict[str, str]:
    """The file of each weight, by the weight's name; empty where the folder has no index.

    Raises:
        UserError: it is no index, or names a file outside of its folder or of another form than safetensors; or
            ``config.json`` is refused (:func:`check_config`).
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
