"""Log-probabilities under a reference that were computed before: a file for each model, a value for each answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rankwise.errors import UserError
from rankwise.files import check_writable, clear_unfinished, write_bytes
from rankwise.preferences.rows import PreferenceRow

FORMAT = "rankwise reference log-probabilities 1"
REMEDY = "delete it, or give another folder"
PENDING = 2**16  # pairs that wait in a dictionary before they are sorted in

# What two computations of one token's log-probability may differ by, in nats, where sums are formed in another order:
# TF32 counts as float32, and in bfloat16 a logit between 16 and 32 is rounded to an eighth. Over the tokens of an
# answer it grows with the root of their number.
TOLERANCES = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.25}

logger = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Hashes of (prompt, answer) in ascending order, 16 bytes each, and the log-probability of each answer."""

    keys: Shaped[ndarray, " pairs"]
    values: Float[ndarray, " pairs"]


class ReferenceCache:
    """Log-probabilities of answers given prompts under one model, by the hash of their token ids.

    Rows that share prompts and answers share values, in whatever order and number the answers come. The file is
    ``<fingerprint>.safetensors``; a pair takes 24 bytes, there and in memory. What is read is checked against a digest
    of the whole content.

    Args:
        folder: of the files; made where it is not there.
        fingerprint: of the model, as :func:`rankwise.preferences.fingerprint.fingerprint` gives it.
        about: a line for messages that says what the values are of: the model's name and ``tokenizer_label``, say.

    Attributes:
        path: of the file.
        about: that line, as the file has it where there is one.

    Raises:
        UserError: the folder cannot be made or written to; the file cannot be read, is cut off, damaged, of something
            else or of another model, or holds a value that is not finite.
    """

    def __init__(self, folder: Path, fingerprint: str, about: str = "") -> None:
        self.folder, self.fingerprint, self.about = folder.expanduser(), fingerprint, about
        self.path = self.folder / f"{fingerprint}.safetensors"
        try:
            check_writable(self.folder)
            clear_unfinished(self.folder)
        except OSError as error:
            raise UserError(
                f"folder {folder} of the reference's log-probabilities cannot be written to ({error}): give another one"
            ) from error
        self._pending: dict[bytes, float] = {}
        self._changed = False
        self._pairs, self.about = self._read() or (_pairs({}), about)

    def __len__(self) -> int:
        """Pairs that are known."""
        self._sort_in()
        return len(self._pairs.keys)

    def get(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float] | None:
        """Log-probabilities of a row's answers in nats, as they were added; None unless all are known."""
        keys = pair_keys(prompt, answers)
        values, known = _find(self._pairs, keys)
        found = [
            self._pending.get(key, value if there else None)
            for key, value, there in zip(keys, values.tolist(), known.tolist(), strict=True)
        ]
        whole = [value for value in found if value is not None]
        return whole if len(whole) == len(answers) else None

    def add(self, prompt: Sequence[int], answers: Sequence[Sequence[int]], values: Sequence[float]) -> None:
        """Keep the log-probabilities of a row's answers; of a pair that is known, the new one.

        Raises:
            UserError: one is not finite.
        """
        for key, answer, value in zip(pair_keys(prompt, answers), answers, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the reference gives {value} as the log-probability of an answer of {len(answer)} tokens after a "
                    f"prompt of {len(prompt)}: look at its weights, or compute in float32 or bfloat16, not float16"
                )
            self._pending[key] = value
        self._changed = True
        if len(self._pending) >= PENDING:
            self._sort_in()

    def save(self) -> None:
        """Write the file anew, with what other processes wrote to it since it was read.

        Where that fails (a full disk, say), the time to compute it again is lost, and a warning says so.

        Raises:
            UserError: the file is there and cannot be read, as for the class.
        """
        if not self._changed:
            return
        self._sort_in()
        try:
            with _locked(self.folder):
                known = self._read()
                if known is not None:
                    self._pairs = _merged(known[0], self._pairs)
                write_bytes(self.path, _packed(self._pairs, self.fingerprint, self.about))
        except OSError as error:
            logger.warning("%s cannot be written (%s): these log-probabilities are not kept", self.path, error)
            return
        self._changed = False

    def verify(
        self,
        rows: Sequence[PreferenceRow],
        score: Callable[[list[PreferenceRow]], list[list[float]]],
        dtype: torch.dtype,
        count: int = 8,
        seed: int = 0,
    ) -> int:
        """Compare values that are known with what the reference gives now.

        Args:
            rows: of this training; those that are known whole are drawn from.
            score: gives the log-probability of each answer of rows, computed anew.
            dtype: in which it computes, which says what rounding may do.
            count: most rows to compare.
            seed: of the draw.

        Returns:
            How many rows were compared: fewer where fewer are known.

        Raises:
            UserError: values differ by more than rounding.
        """
        picked: list[tuple[PreferenceRow, list[float]]] = []
        if not len(self):
            return 0
        for index in np.random.default_rng(seed).permutation(len(rows)):
            known = self.get(rows[index].prompt, rows[index].answers)
            if known is not None:
                picked.append((rows[index], known))
            if len(picked) == count:
                break
        if picked:
            self._compare(picked, score([row for row, _ in picked]), dtype)
        return len(picked)

    def _compare(
        self, picked: list[tuple[PreferenceRow, list[float]]], scored: list[list[float]], dtype: torch.dtype
    ) -> None:
        differences, allowed = [], []
        for (row, known), new in zip(picked, scored, strict=True):
            differences += [abs(one - other) for one, other in zip(known, new, strict=True)]
            allowed += [TOLERANCES[dtype] * math.sqrt(max(len(answer), 1)) for answer in row.answers]
        wrong = sum(not found <= most for found, most in zip(differences, allowed, strict=True))
        if wrong:
            largest = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
            raise UserError(
                f"{self.path} ({self.about or 'nothing is said of it'}) does not hold what the reference gives: of "
                f"{len(differences)} log-probabilities computed again {wrong} differ by more than rounding in {dtype}, "
                f"the largest by {largest:.4g} nats: {REMEDY}"
            )

    def _sort_in(self) -> None:
        if self._pending:
            self._pairs, self._pending = _merged(self._pairs, _pairs(self._pending)), {}

    def _read(self) -> tuple[Pairs, str] | None:
        """The pairs in the file and the line about them; None where there is no file."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or set(file.keys()) != {"keys", "values"}:
                    raise UserError(
                        f"{self.path} is no file of log-probabilities of a reference, or one of another version of "
                        f"rankwise: {REMEDY}"
                    )
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} cannot be read, or is cut off or damaged ({error}): {REMEDY}") from error
        return self._checked(keys, values, about)

    def _checked(self, keys: Any, values: Any, about: dict[str, str]) -> tuple[Pairs, str]:
        whole = keys.dtype == np.uint8 and keys.shape == (len(values), 16) and values.dtype == np.float64
        pairs = Pairs(keys.reshape(-1).view("S16"), values) if whole else _pairs({})
        expected = _metadata(pairs, about.get("fingerprint", ""), about.get("about", ""))
        if not whole or about != expected:
            raise UserError(f"{self.path} is damaged: its content is not what its digest says: {REMEDY}")
        if about["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{self.path} holds log-probabilities of another model ({about['fingerprint']}; {about['about']}): "
                f"{REMEDY}"
            )
        if bad := int((~np.isfinite(values)).sum()):
            raise UserError(f"{self.path}: {bad} of {len(values)} log-probabilities are not finite: {REMEDY}")
        return pairs, about["about"]


def pair_keys(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[bytes]:
    """A BLAKE2b hash of 16 bytes for each answer: over the length of the prompt, its ids and those of the answer."""
    begun = hashlib.blake2b(array("q", [len(prompt), *prompt]).tobytes(), digest_size=16)
    keys = []
    for answer in answers:
        whole = begun.copy()
        whole.update(array("q", answer).tobytes())
        keys.append(whole.digest())
    return keys


def _pairs(values: dict[bytes, float]) -> Pairs:
    """Sorted, from a dictionary."""
    keys = np.array(list(values), dtype="S16")
    order = np.argsort(keys)
    return Pairs(keys[order], np.array(list(values.values()), dtype=np.float64)[order])


def _find(pairs: Pairs, keys: Sequence[bytes]) -> tuple[Float[ndarray, " keys"], Shaped[ndarray, " keys"]]:
    """The value of each key, and whether it is there; where it is not, any number."""
    wanted = np.array(keys, dtype="S16")
    places = _places(pairs, wanted)
    if not len(pairs.keys):
        return np.zeros(len(wanted)), np.zeros(len(wanted), dtype=bool)
    return pairs.values[places], pairs.keys[places] == wanted


def _places(pairs: Pairs, keys: Shaped[ndarray, " keys"]) -> Shaped[ndarray, " keys"]:
    return np.minimum(np.searchsorted(pairs.keys, keys), max(len(pairs.keys) - 1, 0))


def _merged(old: Pairs, new: Pairs) -> Pairs:
    """Both; of a pair that is in both, the new value."""
    if not len(old.keys):
        return new
    places = _places(old, new.keys)
    known = old.keys[places] == new.keys
    values = old.values.copy()
    values[places[known]] = new.values[known]
    others = np.searchsorted(old.keys, new.keys[~known])
    return Pairs(np.insert(old.keys, others, new.keys[~known]), np.insert(values, others, new.values[~known]))


def _metadata(pairs: Pairs, fingerprint: str, about: str) -> dict[str, str]:
    head = {"format": FORMAT, "fingerprint": fingerprint, "about": about}
    digest = hashlib.blake2b(json.dumps(head).encode(), digest_size=16)
    digest.update(pairs.keys.tobytes())
    digest.update(pairs.values.tobytes())
    return {**head, "digest": digest.hexdigest()}


def _packed(pairs: Pairs, fingerprint: str, about: str) -> bytes:
    keys = pairs.keys.view(np.uint8).reshape(-1, 16)
    packed: bytes = save({"keys": keys, "values": pairs.values}, metadata=_metadata(pairs, fingerprint, about))
    return packed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within it no other process saves here; the system drops the lock when a process ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
