"""Starts that were computed before: a file for each weight, found by the weight's content."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rankwise.directions.triplets import Part, Triplets, triplets
from rankwise.errors import UserError
from rankwise.files import check_writable, clear_unfinished, write_bytes

VERSION = 1  # raised whenever the triplets of a weight come out differently, beyond the solvers' tolerance

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$RANKWISE_CACHE/starts``, else ``$XDG_CACHE_HOME/rankwise/starts``, else ``~/.cache/rankwise/starts``."""
    own = os.environ.get("RANKWISE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path("~/.cache")) / "rankwise"
    return folder.expanduser() / "starts"


class StartCache:
    """Singular triplets of weights that were seen before.

    A start is found by what it depends on: the weight's values, shape and dtype, the rank, the part and, for
    ``random``, the seed. A file that cannot be read, or whose content differs from the digest in it, is computed again
    and replaced.

    Args:
        folder: of the files; made when the first one is written.

    Attributes:
        reused: starts that were read.
        broken: files that could not be used.
        lost: starts that could not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        self.reused = 0
        self.broken = 0
        self.lost = 0

    def triplets(self, weight: Float[Tensor, "m n"], rank: int, part: Part, seed: int = 0) -> Triplets:
        """The same as :func:`rankwise.directions.triplets`, from a file where there is one, else computed and kept.

        Raises:
            UserError: an unknown part, a rank out of range, or a weight that is no finite matrix.
        """
        path = self.folder / f"{start_key(weight, rank, part, seed)}.safetensors"
        found = self._read(path)
        if found is None:
            found = triplets(weight, rank, part, seed)
            self._keep(path, found)
        else:
            self.reused += 1
        return Triplets(*(tensor.to(weight.device) for tensor in found))

    def _keep(self, path: Path, found: Triplets) -> None:
        """Write a start; where that fails (a full disk, say), only the time is lost, and it is said once."""
        try:
            write_bytes(path, _packed(found))
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                logger.warning("%s cannot be written (%s): starts are computed and not kept", self.folder, error)

    def _read(self, path: Path) -> Triplets | None:
        """The triplets of a file; none where there is no file or no sound one."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = Triplets(*(file.get_tensor(name) for name in Triplets._fields))
                sound = (file.metadata() or {}).get("digest") == _digest(found)
        except (SafetensorError, OSError):
            sound = False
        if sound:
            return found
        self.broken += 1
        logger.warning("%s is damaged: its start is computed again", path)
        return None


@functools.cache
def start_cache(folder: str) -> StartCache:
    """The cache of a folder: the same one, with its counts, wherever this process asks for it.

    Raises:
        UserError: the folder cannot be made, or not be written to.
    """
    cache = StartCache(Path(folder))
    try:
        check_writable(cache.folder)
        clear_unfinished(cache.folder)
    except OSError as error:
        raise UserError(f"cache {folder} cannot be written to ({error}): give another folder, or none") from error
    return cache


def check_device(device: str | None) -> None:
    """Raise a ``UserError`` for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"start_device {device!r} cannot be used ({str(error).splitlines()[0]}): try 'cpu'") from error


def start_key(weight: Float[Tensor, "m n"], rank: int, part: Part, seed: int = 0) -> str:
    """What a start depends on, as 32 hexadecimal digits; the seed counts for ``random`` alone."""
    drawn = seed if part == "random" else 0
    about = f"{VERSION} {weight.dtype} {tuple(weight.shape)} {rank} {part} {drawn}"
    return _hash(about, weight)


def _packed(found: Triplets) -> bytes:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in found._asdict().items()}
    return save(tensors, metadata={"digest": _digest(found)})


def _digest(found: Triplets) -> str:
    return _hash(" ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in found), *found)


def _hash(about: str, *tensors: Tensor) -> str:
    """A hash of a text and of tensors' values."""
    made = hashlib.blake2b(about.encode(), digest_size=16)
    for tensor in tensors:
        made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()
