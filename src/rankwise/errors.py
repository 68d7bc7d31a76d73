"""The one error that a user's mistake becomes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: the message names the thing, its value and the remedy.

    Commands print it as one line on stderr and exit with 2; library callers catch it as a ``ValueError``.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``word``: the closest known one, or all of them where none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name before the message of a ``UserError``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
