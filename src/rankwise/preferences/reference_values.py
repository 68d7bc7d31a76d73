"""The reference's log-probabilities of rows, computed once before training: by all processes, or out of a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.files import write_json
from rankwise.likelihood import unwrapped
from rankwise.preferences.batches import BatchMaker, answer_totals
from rankwise.preferences.fingerprint import fingerprint, tokenizer_label
from rankwise.preferences.reference import Reference
from rankwise.preferences.reference_cache import TOLERANCES, ReferenceCache
from rankwise.preferences.rows import PreferenceRow
from rankwise.reading import read_json

CHECKED = 8  # rows whose values a checkpoint keeps
CHECK_FILE = "reference.json"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ReferenceValues:
    """Fills in ``reference`` of rows.

    Args:
        accelerator: of the training.
        batch: makes batches.
        size: rows of a batch.
        autocast: what the training computes within.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batch: BatchMaker,
        size: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._accelerator, self._batch, self._size, self._autocast = accelerator, batch, size, autocast

    def fill(
        self,
        reference: Reference,
        rows: Sequence[PreferenceRow],
        folder: str | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> int:
        """Fill in all rows; returns how many were computed.

        Args:
            reference: what computes them.
            rows: of training and evaluation.
            folder: of the cache, optional.
            tokenizer: of the rows, for messages.

        Raises:
            UserError: the cache is not to be read, or holds something else than what the reference gives.
        """
        with reference.active() as model:
            cache = None
            if folder is not None and self._accelerator.is_main_process:
                cache = self._cache(model, reference.adapters, Path(folder), rows, tokenizer)
            known = self._known(cache, rows)
            missing = [row for row, is_known in zip(rows, known, strict=True) if not is_known]
            for row, values in zip(missing, self._scored(model, missing), strict=True):
                _check_finite(row, values)
                row.reference = values
                if cache is not None:
                    cache.add(row.prompt, row.answers, values)
        if cache is not None:
            cache.save()
        return len(missing)

    def first(self, reference: Reference, rows: Sequence[PreferenceRow]) -> list[list[float]]:
        """The reference's log-probabilities of the answers of a few rows.

        Raises:
            UserError: one is not finite.
        """
        with reference.active() as model:
            found = self._scored(model, rows)
        for row, values in zip(rows, found, strict=True):
            _check_finite(row, values)
        return found

    def _cache(
        self,
        model: nn.Module,
        adapters: Sequence[str],
        folder: Path,
        rows: Sequence[PreferenceRow],
        tokenizer: PreTrainedTokenizerBase,
    ) -> ReferenceCache:
        """The cache of this model, a few of whose values were compared with what the model gives now."""
        precision = autocast_dtype(self._accelerator)
        about = (
            f"{unwrapped(model).config.name_or_path or type(unwrapped(model)).__name__}, {tokenizer_label(tokenizer)}"
        )
        cache = ReferenceCache(folder, fingerprint(model, adapters, precision), about)

        def score(picked: list[PreferenceRow]) -> list[list[float]]:
            totals = self._totals(model, picked).tolist()
            return [values[: len(row.answers)] for row, values in zip(picked, totals, strict=True)]

        cache.verify(rows, score, precision or unwrapped(model).dtype)
        return cache

    def _known(self, cache: ReferenceCache | None, rows: Sequence[PreferenceRow]) -> list[bool]:
        """Fill in what the main process finds in its cache; which rows these were, alike in all processes."""
        most = max(len(row.answers) for row in rows)
        found = torch.zeros(len(rows), most + 1, dtype=torch.float64)
        if cache is not None:
            for place, row in enumerate(rows):
                values = cache.get(row.prompt, row.answers)
                if values is not None:
                    found[place, : len(values)], found[place, -1] = torch.tensor(values, dtype=torch.float64), 1.0
        for row, (*values, is_known) in zip(rows, self._added_up(found).tolist(), strict=True):
            if is_known:
                row.reference = values[: len(row.answers)]
        return [row.reference is not None for row in rows]

    def _scored(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> list[list[float]]:
        """Log-probabilities of each row's answers, in batches of rows of about one length."""
        most = max((len(row.answers) for row in rows), default=0)
        found = torch.zeros(len(rows), most, dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda index: rows[index].length, reverse=True)  # too large shows at once
        own = order[self._accelerator.process_index :: self._accelerator.num_processes]
        share = math.ceil(len(rows) / self._accelerator.num_processes)
        # All processes call the model equally often, as sharded weights need: one that has a row less takes another.
        padded = own + order[: share - len(own)]
        for start in range(0, share, self._size):
            picked, kept = padded[start : start + self._size], own[start : start + self._size]
            totals = self._totals(model, [rows[index] for index in picked])
            found[kept, : totals.shape[1]] = totals[: len(kept)]
        values = self._added_up(found).tolist()
        return [row_values[: len(row.answers)] for row, row_values in zip(rows, values, strict=True)]

    def _totals(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Tensor:
        batch = self._batch(rows).to(self._accelerator.device)
        with self._autocast():
            return answer_totals(model, batch).cpu().double()

    def _added_up(self, values: Tensor) -> Tensor:
        """The sum over processes, on the CPU."""
        if self._accelerator.num_processes == 1:
            return values
        total: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "sum")
        return total.cpu()


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    return AUTOCAST.get(str(accelerator.mixed_precision))


def write_check(checkpoint: Path, values: Sequence[Sequence[float]]) -> None:
    """Keep the reference's log-probabilities of the first rows beside a checkpoint."""
    write_json(checkpoint / CHECK_FILE, values)


def check_resumed(
    checkpoint: Path, rows: Sequence[PreferenceRow], values: Sequence[Sequence[float]], dtype: torch.dtype
) -> None:
    """See that a training goes on with the reference, and the rows, that its checkpoint had.

    Args:
        checkpoint: its folder.
        rows: the first of the training.
        values: the reference's log-probabilities of their answers.
        dtype: in which they are computed, which says what rounding may do.

    Raises:
        UserError: one differs by more, or the checkpoint tells of no reference.
    """
    path = checkpoint / CHECK_FILE
    if not path.is_file():
        raise UserError(f"{checkpoint} was trained without a reference, or by another trainer: begin anew")
    kept = read_json(path, list, "resume from another checkpoint")
    if not all(isinstance(one, list) and all(isinstance(value, int | float) for value in one) for one in kept):
        raise UserError(f"{path} holds no log-probabilities of rows: resume from another checkpoint")
    triples = zip(rows, values, kept, strict=False)
    if len(kept) != len(rows) or not all(_alike(row, one, other, dtype) for row, one, other in triples):
        raise UserError(
            f"{checkpoint} was trained against another reference or on other rows than those given: resume with the "
            "model that its training began with (not the checkpoint's own), and the same rows in the same order"
        )


def _alike(row: PreferenceRow, found: Sequence[float], kept: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether log-probabilities of the row's answers are the same, but for rounding."""
    if len(found) != len(kept):
        return False
    triples = zip(found, kept, row.answers, strict=True)
    return all(abs(one - other) <= TOLERANCES[dtype] * math.sqrt(len(answer)) for one, other, answer in triples)


def _check_finite(row: PreferenceRow, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the reference gives {values} as log-probabilities of the answers of row {row.number}: look at its"
            " weights, or compute in float32 or bfloat16, not float16"
        )
