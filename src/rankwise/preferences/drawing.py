"""The rejected answers that rows get while they are trained on: the number by stage, and which ones by draw."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.files import write_json
from rankwise.preferences.config import OWN, SoftmaxDPOConfig
from rankwise.preferences.mining import mine_hard
from rankwise.preferences.negatives import Catalogue, Drawn, check_negatives, draw_negatives, negatives_at
from rankwise.preferences.rows import PreferenceRow
from rankwise.reading import read_json
from rankwise.tokenise import answer_ids, padding_token
from rankwise.trees.trie import CatalogueTrie

FROM_CATALOGUE = ("uniform", "popularity", "hard")
ALIKE = "answers of the catalogue with the tokens of another one, drawn as one"
ALONE = "times that a row's batch had no negative for it, and another chosen answer was drawn"
MINED_FILE = "mined_answers_{}.json"
OTHERS = 50  # chosen answers of other rows that are looked at then


class Negatives:
    """Draws rejected answers for rows.

    A draw depends on the seed, the row and its pass alone, so that a training that was stopped goes on with the same
    ones; hard ones depend on the model too, and those of a batch on the batch.

    Args:
        settings: which answers, how many, by which seed.
        rows: the training rows, numbered from 1.
        seen: of each row, texts that are never drawn for it.
        catalogue: of the answers to draw from, where the kind needs one.
        tokenizer: of the catalogue's answers.

    Attributes:
        counts: rows that will have fewer negatives than wanted, and more of that kind.

    Raises:
        UserError: there is no catalogue where one is needed, or a row has no answer to draw.
    """

    def __init__(
        self,
        settings: SoftmaxDPOConfig,
        rows: Sequence[PreferenceRow],
        seen: Sequence[Collection[str]],
        catalogue: Catalogue | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.kind, self.seed, self.catalogue, self.pool = (
            settings.negatives,
            settings.seed,
            catalogue,
            settings.mine_pool,
        )
        self._stages = settings.stages() or [(0.0, max(1, *(len(row.answers) - 1 for row in rows)))]
        self._rows, self._seen = rows, seen
        self._padding = padding_token(tokenizer)
        self._mined: dict[int, list[str]] = {}
        self._names: dict[tuple[int, ...], str] = {}  # by its tokens, the text that stands for an answer
        if catalogue is not None and self.kind in FROM_CATALOGUE:
            self.catalogue = self._merged(catalogue, tokenizer)
        if self.kind not in OWN:
            self._seen = self._named(seen, tokenizer)
        wanted = self._stages[-1][1] if settings.stages() else 1
        self.counts = check_negatives((self._fields(row) for row in rows), wanted, self.kind, self.catalogue)
        if catalogue is not None and self.catalogue is not None:
            count(self.counts, ALIKE, len(catalogue.answers) - len(self.catalogue.answers))

    def draw(self, rows: Sequence[PreferenceRow], share: float, number: int) -> list[PreferenceRow]:
        """The rows with the rejected answers of one draw.

        Args:
            rows: of a batch.
            share: of the training that is done, from 0 to 1.
            number: of the draw: the pass over the rows.
        """
        wanted = negatives_at(self._stages, share)
        if self.kind in OWN:
            return [self._own(row, wanted, number) for row in rows]
        return [self._other(row, rows, wanted, number) for row in rows]

    def mine(self, model: nn.Module, rows: Sequence[PreferenceRow], number: int) -> None:
        """Find hard negatives for rows with the model as it is, as many as the last stage needs."""
        assert self.catalogue is not None
        excluded = [self.catalogue.excluded(self._fields(row)) for row in rows]
        pools = None
        if self.pool is not None:
            generators = [random.Random(f"{self.seed}:pool:{row.number}:{number}") for row in rows]
            drawn = zip(generators, excluded, strict=True)
            pools = [self.catalogue.draw(generator, barred, self.pool)[0] for generator, barred in drawn]
        prompts, most = [row.prompt for row in rows], self._stages[-1][1]
        found = mine_hard(model, prompts, self._trie, excluded, most, padding=self._padding, pools=pools)
        texts = [[self.catalogue.answers[place] for place in places] for places in found]
        self._mined = {row.number: mined for row, mined in zip(rows, texts, strict=True)}

    def keep_mined(
        self, checkpoint: Path, process: int, processes: int, batches: Sequence[Sequence[PreferenceRow]]
    ) -> None:
        """Write what is mined for batches that a process has yet to train on beside its checkpoint."""
        answers = {row.number: self._mined[row.number] for rows in batches for row in rows}
        kept = {"batches": len(batches), "answers": answers, "processes": processes}
        write_json(checkpoint / MINED_FILE.format(process), kept)

    def take_mined(self, checkpoint: Path, process: int, processes: int) -> int:
        """Read it again; for how many batches it is, 0 where nothing was kept, or for other shares of the rows."""
        path = checkpoint / MINED_FILE.format(process)
        if not path.is_file():
            return 0
        kept = read_json(path, dict, "resume from another checkpoint")
        try:
            mined = {
                int(number): [text for text in texts if self._ids[text]] for number, texts in kept["answers"].items()
            }
            batches = int(kept["batches"]) if kept.get("processes", processes) == processes else 0
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): resume from another checkpoint") from error
        self._mined = mined
        return batches

    def _merged(self, catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase) -> Catalogue:
        """The catalogue with one answer of those whose tokens are the same, which no model can tell apart."""
        ids_of = dict(zip(catalogue.answers, answer_ids(tokenizer, catalogue.answers), strict=True))
        names = [self._names.setdefault(tuple(ids), text) for text, ids in ids_of.items()]
        self._ids = {text: ids_of[text] for text in self._names.values()}
        self._trie = CatalogueTrie(list(self._ids.values()))
        return catalogue.merged(names)

    def _named(self, seen: Sequence[Collection[str]], tokenizer: PreTrainedTokenizerBase) -> Sequence[Collection[str]]:
        """The seen texts of each row, with the name in place of a text that has the tokens of one."""
        for row in self._rows:
            self._names.setdefault(tuple(row.answers[0]), row.texts[0])
        known = set(self._names.values())
        others = list({text for texts in seen for text in texts if isinstance(text, str)} - known)
        pairs = zip(others, map(tuple, answer_ids(tokenizer, others)), strict=True)
        names = {text: self._names[ids] for text, ids in pairs if ids in self._names}
        return [
            texts if names.keys().isdisjoint(texts) else {names.get(text, text) for text in texts} for texts in seen
        ]

    def _own(self, row: PreferenceRow, wanted: int, number: int) -> PreferenceRow:
        """With some of its own answers, and what is known of them."""
        drawn = self._draw(row, wanted, number, ())
        places = [0, *(row.texts.index(text, 1) for text in drawn.answers)]
        reference = None if row.reference is None else [row.reference[place] for place in places]
        answers, texts = [row.answers[place] for place in places], [row.texts[place] for place in places]
        return replace(row, answers=answers, texts=texts, reference=reference)

    def _other(self, row: PreferenceRow, batch: Sequence[PreferenceRow], wanted: int, number: int) -> PreferenceRow:
        """With answers of the catalogue or of other rows."""
        if self.kind != "in-batch":
            ids, others = self._ids, self._mined.get(row.number, [])
        else:
            ids = {self._name(other): other.answers[0] for other in self._beside(row, batch, number)}
            others = list(ids)
        drawn = self._draw(row, wanted, number, others)
        answers = [row.answers[0], *(list(ids[text]) for text in drawn.answers)]
        texts = [row.texts[0], *drawn.answers]
        return replace(row, answers=answers, texts=texts, weights=drawn.weights, reference=None)

    def _beside(self, row: PreferenceRow, batch: Sequence[PreferenceRow], number: int) -> Sequence[PreferenceRow]:
        """The batch's other rows, or some of all rows where these have nothing but what the row must not get."""
        barred = {self._name(row), *self._seen[row.number - 1]}
        if any(self._name(other) not in barred for other in batch):
            return [other for other in batch if other.number != row.number]
        count(self.counts, ALONE, 1)
        generator = random.Random(f"{self.seed}:others:{row.number}:{number}")
        return generator.sample(self._rows, min(OTHERS, len(self._rows)))

    def _draw(self, row: PreferenceRow, wanted: int, number: int, others: Sequence[str]) -> Drawn:
        return draw_negatives(
            self._fields(row),
            wanted,
            self.kind,
            seed=self.seed,
            number=row.number,
            draw=number,
            catalogue=self.catalogue,
            others=others,
        )

    def _fields(self, row: PreferenceRow) -> Mapping[str, Any]:
        """What a draw reads."""
        listed, seen = row.texts[1:], self._seen[row.number - 1]
        return {"chosen": self._name(row), "rejected": listed, "candidates": listed, "seen": seen}

    def _name(self, row: PreferenceRow) -> str:
        """The text that stands for the chosen answer: of all with its tokens, the catalogue's."""
        return self._names.get(tuple(row.answers[0]), row.texts[0])
