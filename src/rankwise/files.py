"""Writing that leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASIDE = ".old"  # how the name of a folder ends that another is about to replace


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: temporary file beside it, fsync, rename."""
    _write(path, [content])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace ``path`` by one JSON object a line, in one step; the rows need not be in memory together."""
    _write(path, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def check_writable(folder: Path) -> None:
    """Make ``folder`` where it is not there, and see that a file can be written in it.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = _beside(folder / "probe")
    probe.touch()
    probe.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of ``path`` when the block ends without an error.

    Where the block or the exchange fails, ``path`` is as it was. A folder that was there is moved aside first and
    removed last. What a process that was killed left of its temporary folder is removed by the next one.

    Raises:
        FileExistsError: ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, where a folder is to be made")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path)
    temporary.mkdir()
    lock = _lock(temporary)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _settle(file)
        _exchange(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of ``path`` that no living process has locked.

    An empty one may belong to a process that is just about to lock it. Where ``path`` is gone and was moved aside, its
    exchange was cut off: everything is left then, for a person to look at.
    """
    unfinished = f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"
    if not path.exists() and any(path.parent.glob(f"{unfinished}{ASIDE}")):
        return
    for folder in path.parent.glob(unfinished):
        if folder.is_symlink() or not folder.is_dir() or not any(folder.iterdir()):
            continue
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, which the system drops when the process ends; None where another holds it or none can be."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened


def _settle(path: Path) -> None:
    """Have a file on the disk, as readable as its folder: some libraries write for the owner alone."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _exchange(made: Path, path: Path) -> None:
    if not path.exists():
        made.rename(path)
        return
    aside = _beside(path, ASIDE)
    path.rename(aside)
    try:
        made.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def _beside(path: Path, end: str = "") -> Path:
    """A name that no other process takes; made with the user's own permissions, which tempfile's would not have."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{end}")
