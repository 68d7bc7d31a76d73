"""Writing that leaves either the old file or the new one, never half of one, and folders that say what is in them."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import UserError

ASIDE = ".old"  # how the name of a folder ends that another is about to replace
MANIFEST = "manifest.json"  # in a folder: the size and the SHA-256 of each of its files
LONGEST = 200  # bytes of a name that is written out in that of what is being written
UNFINISHED = "[0-9a-f]" * 32  # how the name of what is being written ends


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: temporary file beside it, fsync, rename."""
    _write(path, [content])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _beside(path), None
    try:
        with temporary.open("xb") as file:
            lock, _ = _lock(temporary)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _settle_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON; NaN and infinity, which JSON has not, as ``null``."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None in the place of each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON (:func:`to_json`), in one step."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace ``path`` by one JSON object a line, in one step; the rows need not be in memory together."""
    _write(path, (to_json(row).encode() + b"\n" for row in rows))


def check_writable(folder: Path) -> None:
    """Make ``folder`` where it is not there, and see that a file can be written in it.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = _beside(folder / "probe")
    probe.touch()
    probe.unlink()


def check_output(path: Path) -> None:
    """See before slow work that a file or folder can be made at ``path``; the folder that it is to lie in is made.

    Raises:
        UserError: it cannot.
    """
    try:
        check_writable(path.absolute().parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give another place") from error


def clear_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left in a folder of files and folders that they were writing there."""
    for left in [*folder.glob(f".*.{UNFINISHED}")]:
        _remove_unlocked(left)


class Damaged(UserError):
    """A folder is not what was written."""


class InUse(UserError):
    """Another process writes in the folder."""


def is_in_use(folder: Path) -> bool:
    """Whether a process of this machine, this one too, is within :func:`in_use` of the folder."""
    lock, is_free = _lock(folder)
    if lock is not None:
        os.close(lock)
    return not is_free


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a folder that this one writes in; it is made where it is not there.

    What a process that was killed left of files and folders that it was writing in it is removed.

    Raises:
        InUse: another process that is alive writes in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, is_free = _lock(folder)
    if not is_free:
        raise InUse(f"{folder} is being written by another process: wait for it, or give another folder")
    try:
        for left in [*folder.rglob(f".*.{UNFINISHED}")]:
            _remove_unlocked(left)
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def new_folder(path: Path, kind: str | None = None) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of ``path`` when the block ends without an error.

    It gets a ``manifest.json``, by which :func:`check_folder` sees later whether its files are still what they were.
    Where the block or the exchange fails, ``path`` is as it was. A folder that was there is moved aside first and
    removed last. What a process that was killed left of its temporary folder is removed by the next one, and where it
    was killed in the middle of the exchange, what was moved aside is put back first.

    Args:
        path: of the folder.
        kind: what it is, for :func:`check_replaceable`.

    Raises:
        FileExistsError: ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, where a folder is to be made")
    with temporary_folder(path) as made:
        yield made
        complete_folder(made, path, kind)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder to fill and to give the name ``path``; it is removed where the block fails, or the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path)
    temporary.mkdir()
    lock, _ = _lock(temporary)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def complete_folder(made: Path, path: Path, kind: str | None = None) -> None:
    """Write the manifest of a folder that is filled, have it on the disk, and put it in the place of ``path``."""
    files = sorted(file for file in made.rglob("*") if file.is_file() and file != made / MANIFEST)
    named = {} if kind is None else {"kind": kind}
    listed = {file.relative_to(made).as_posix(): _described(file) | named for file in files}
    (made / MANIFEST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    for file in (*files, made / MANIFEST):
        _settle(file)
    for folder in {file.parent for file in files} | {made}:
        _settle_folder(folder)
    _exchange(made, path)
    _settle_folder(path.parent)


def check_replaceable(folder: Path, kind: str) -> None:
    """See that a folder is new, empty, or one of this kind with nothing else in it, so that nothing else is lost.

    Raises:
        UserError: it is a file, or holds something else: a trained checkpoint, another program's folder, a note.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    held = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
    held -= {MANIFEST}
    try:
        listed = _manifest(folder / MANIFEST) if folder.is_dir() else {}
        theirs = {name for name, entry in listed.items() if entry.get("kind") == kind}
    except (OSError, ValueError, TypeError, AttributeError):
        theirs = set()
    if folder.exists() and (held != theirs or not held):
        stray = f" ({sorted(held - theirs)[0]})" if held - theirs else ""
        raise UserError(
            f"{folder} holds something other than an earlier {kind}{stray}: give a new folder, or remove it first"
        )


def check_folder(folder: Path, whole: bool = False) -> None:
    """See that each file which a folder's manifest lists is there and is, byte for byte, what was written.

    Files that are not listed are not looked at.

    Args:
        folder: that :func:`new_folder` made.
        whole: whether a folder without a manifest is refused; it is taken as it is otherwise: others write none.

    Raises:
        Damaged: a file is missing or another, or the manifest is missing or unreadable.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if whole:
            raise Damaged(f"{folder} has no {MANIFEST}: it was not written to its end, or is of another program")
        return
    try:
        listed = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in _manifest(path).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is damaged: fetch or make the folder again") from error
    for file, (size, digest) in listed.items():
        if not file.is_file():
            raise Damaged(f"{file} is missing: fetch or make the folder again")
        if (file.stat().st_size, file_digest(file)) != (size, digest):
            raise Damaged(
                f"{file} is not as it was written, by its SHA-256 in {MANIFEST}: fetch or make the folder again, or "
                f"remove {MANIFEST} if you changed the file yourself"
            )


def _manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} is outside of the folder")
    return found


def _described(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of ``path`` that no living process has locked.

    Where ``path`` is gone and one folder was moved aside, its exchange was cut off: that one is put back. Of several,
    none is touched, for a person to look at.
    """
    unfinished = f".{glob.escape(_short(path.name))}.{UNFINISHED}"
    aside = list(path.parent.glob(f"{unfinished}{ASIDE}"))
    if aside and not path.exists():
        if len(aside) > 1:
            return
        aside.pop().rename(path)
    for folder in (*path.parent.glob(unfinished), *aside):
        _remove_unlocked(folder)


def remove_folder(path: Path) -> None:
    """Remove a folder, in one step for those who look for it under its name; nothing where it is not there."""
    if path.is_dir():
        aside = path.rename(_beside(path))
        shutil.rmtree(aside, ignore_errors=True)  # another process may be clearing it too


def _remove_unlocked(path: Path) -> None:
    """Remove a temporary file or folder that no living process has locked; an empty folder may be about to be."""
    if path.is_symlink() or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    lock, _ = _lock(path)
    if lock is not None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path) -> tuple[int | None, bool]:
    """A lock on a file or a folder, which the system drops when the process ends, and whether no other process has one.

    None where there is no lock to be had: on Windows, on some network filesystems, or where another has it.
    """
    if sys.platform == "win32":
        return None, True
    import fcntl

    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return None, True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        return None, not isinstance(error, BlockingIOError)
    return opened, True


def _settle(path: Path) -> None:
    """Have a file on the disk, as readable as its folder: some libraries write for the owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _settle_folder(path: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    if sys.platform == "win32":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:  # some filesystems know no such thing
        pass
    finally:
        os.close(opened)


def _exchange(made: Path, path: Path) -> None:
    if not path.exists() or (sys.platform != "win32" and not any(path.iterdir())):  # an empty folder gives way
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
    return path.with_name(f".{_short(path.name)}.{uuid.uuid4().hex}{end}")


def _short(name: str) -> str:
    """A name that leaves room for what is put around it: most filesystems take 255 bytes."""
    return name if len(name.encode()) <= LONGEST else hashlib.sha256(name.encode()).hexdigest()
