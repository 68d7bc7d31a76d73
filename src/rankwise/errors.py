"""The one error that a user's mistake becomes, and the one by which a training ends that was asked to."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: the message names the thing, its value and the remedy.

    Commands print it as one line on stderr and exit with 2; library callers catch it as a ``ValueError``.
    """


class Stopped(BaseException):
    """A training ended because its process was asked to: the message says where, and how it goes on.

    No ``Exception``, as ``KeyboardInterrupt`` is none: libraries that catch any would go on.
    """


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    return cut(repr(value), 80)


def cut(text: str, most: int) -> str:
    """The first characters of a text, at most so many; dots say that there were more."""
    return text if len(text) <= most else f"{text[:most]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``word``: the closest known one, or all of them where none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {shown(close[0])}?"
    return f"known: {cut(' '.join(', '.join(options).split()), 1000)}"  # in one line, whatever the names


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name before the message of a ``UserError``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


SPACE, FORBIDDEN = "free some space there", "give another place, or the right to use this one"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "raise the limit of a file's size, or give a folder on another disk",
    errno.EROFS: FORBIDDEN,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
}


def system_failure(error: BaseException) -> str | None:
    """What a full disk, a missing permission and the like are called, with a remedy; None for any other error.

    Libraries that are not written in Python give the system's number in the text of errors of their own.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(told[1])
    if number not in REMEDIES:
        return None
    place = getattr(error, "filename", None)
    what = f"{place}: {os.strerror(number)}" if place else " ".join(str(error).split())
    return f"{what}: {REMEDIES[number]}; what was there before is as it was"
