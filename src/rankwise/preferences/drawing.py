"""The rejected answers that rows get while they are trained on: the number by stage, and which ones by draw."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.preferences.config import OWN
from rankwise.preferences.mining import answer_trie, mine_hard
from rankwise.preferences.negatives import Catalogue, Kind, check_negatives, draw_negatives, negatives_at
from rankwise.preferences.rows import PreferenceRow
from rankwise.tokenise import answer_ids, padding_token

FROM_CATALOGUE = ("uniform", "popularity", "hard")


class Negatives:
    """Draws rejected answers for rows.

    A draw depends on the seed, the row and its pass alone, so that a training that was stopped goes on with the same
    ones; hard ones depend on the model too.

    Args:
        kind: as :func:`rankwise.preferences.negatives.draw_negatives` has them.
        stages: starts and numbers, as :func:`rankwise.preferences.negatives.stages_of_negatives` gives them; None for
            all that a row has.
        seed: of the draws.
        rows: the training rows.
        seen: of each row, texts that are never drawn for it.
        catalogue: of the answers to draw from, where the kind needs one.
        tokenizer: of the catalogue's answers.
        pool: how many answers of the catalogue are ranked for a row to mine hard ones; all where not given.

    Raises:
        UserError: there is no catalogue where one is needed, or a row has no answer to draw.
    """

    def __init__(
        self,
        kind: Kind,
        stages: Sequence[tuple[float, int]] | None,
        seed: int,
        rows: Sequence[PreferenceRow],
        seen: Sequence[Collection[str]],
        catalogue: Catalogue | None,
        tokenizer: PreTrainedTokenizerBase,
        pool: int | None = None,
    ) -> None:
        self.kind, self.seed, self.catalogue, self.pool = kind, seed, catalogue, pool
        self._stages = stages or [(0.0, max(len(row.answers) for row in rows) - 1)]
        self._numbers = {id(row): number for number, row in enumerate(rows, start=1)}
        self._seen = seen
        self._padding = padding_token(tokenizer)
        self._mined: dict[int, list[str]] = {}
        most = self._stages[-1][1]
        self.counts = check_negatives((self._fields(row) for row in rows), most, kind, catalogue)
        if catalogue is not None and kind in FROM_CATALOGUE:
            self._trie = answer_trie(tokenizer, catalogue.answers)
            self._ids = dict(zip(catalogue.answers, self._trie.answers, strict=True))

    def draw(self, rows: Sequence[PreferenceRow], share: float, number: int) -> list[PreferenceRow]:
        """The rows with the rejected answers of one draw.

        Args:
            rows: of a batch.
            share: of the training that is done, from 0 to 1.
            number: of the draw: the pass over the rows.
        """
        count = negatives_at(self._stages, share)
        return [self._drawn(row, rows, count, number) for row in rows]

    def mine(self, model: nn.Module, rows: Sequence[PreferenceRow], share: float, number: int) -> None:
        """Find hard negatives for rows with the model as it is; they are kept until the next call."""
        assert self.catalogue is not None
        excluded = [self.catalogue.excluded(self._fields(row)) for row in rows]
        pools = None
        if self.pool is not None:
            generators = [random.Random(f"{self.seed}:pool:{self._numbers[id(row)]}:{number}") for row in rows]
            drawn = zip(generators, excluded, strict=True)
            pools = [self.catalogue.draw(generator, barred, self.pool)[0] for generator, barred in drawn]
        found = mine_hard(
            model,
            [row.prompt for row in rows],
            self._trie,
            excluded,
            negatives_at(self._stages, share),
            padding=self._padding,
            pools=pools,
        )
        texts = [[self.catalogue.answers[place] for place in places] for places in found]
        self._mined = {id(row): mined for row, mined in zip(rows, texts, strict=True)}

    def _drawn(self, row: PreferenceRow, batch: Sequence[PreferenceRow], count: int, number: int) -> PreferenceRow:
        others: Sequence[str] = self._mined.get(id(row), ())
        if self.kind == "in-batch":
            others = [other.texts[0] for other in batch if other is not row]
        drawn = draw_negatives(
            self._fields(row),
            count,
            self.kind,
            seed=self.seed,
            number=self._numbers[id(row)],
            draw=number,
            catalogue=self.catalogue,
            others=others,
        )
        if self.kind in OWN:
            places = [0, *(row.texts.index(text, 1) for text in drawn.answers)]
            reference = None if row.reference is None else [row.reference[place] for place in places]
            answers = [row.answers[place] for place in places]
            return replace(row, answers=answers, texts=[row.texts[place] for place in places], reference=reference)
        ids = self._ids if self.kind != "in-batch" else {other.texts[0]: other.answers[0] for other in batch}
        answers = [row.answers[0], *(list(ids[text]) for text in drawn.answers)]
        return replace(
            row, answers=answers, texts=[row.texts[0], *drawn.answers], weights=drawn.weights, reference=None
        )

    def _fields(self, row: PreferenceRow) -> Mapping[str, Any]:
        seen = self._seen[self._numbers[id(row)] - 1]
        return {"chosen": row.texts[0], "rejected": row.texts[1:], "candidates": row.texts[1:], "seen": seen}


def longest_answer(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> int:
    """Tokens of the catalogue's longest answer, its end included."""
    return max(map(len, answer_ids(tokenizer, catalogue.answers)))
