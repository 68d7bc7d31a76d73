"""Questions with a choice of answers: the commonsense sets in the form of LLM-Adapters (arXiv 2304.01933).

A row has an ``instruction`` that ends with "Answer format: " and the choices between slashes, an ``output`` to train
on, and the right choice as its ``answer``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.generation import generate_answers
from rankwise.preferences.rows import PreferenceRow
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.instructions import alpaca_prompt
from rankwise.tasks.preferences import PreferenceTask
from rankwise.tasks.tables import as_text, read_rows, require_columns
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import CUT_TO_WRITE, fit_prompts

COLUMNS = ("instruction", "output", "answer")
FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")
UNUSABLE = "rows whose choices, answer and output do not fit"
WRITTEN = ("accuracy written", "answered")
SHARES = ("accuracy", *WRITTEN)
Rows = list[dict[str, Any]]


def read_choices(path: Path, part: str) -> tuple[Rows, dict[str, int]]:
    """Rows of ``prompt``, ``chosen``, ``rejected``, ``choices`` (the right one first) and ``set``.

    The rejected answers are the output with each other choice in the place of the right one.

    Args:
        path: a table (see :func:`rankwise.tasks.tables.read_rows`), or a folder of sets' folders, as LLM-Adapters
            publishes them: boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa.
        part: the file's name in a set's folder: ``train`` or ``test``.

    Returns:
        The rows, whose ``set`` is the name of the folder that they are from, and what was dropped.

    Raises:
        UserError: a file cannot be read or lacks a column, or no row is usable.
    """
    files = sorted(path.glob(f"*/{part}.json")) or [path / f"{part}.json"] if path.is_dir() else [path]
    kept: Rows = []
    counts: dict[str, int] = {}
    for file in files:
        rows, dropped = read_rows(file)
        require_columns(file, rows, COLUMNS)
        for what, number in dropped.items():
            count(counts, what, number)
        for row in rows:
            made = _choice(row)
            count(counts, UNUSABLE, int(made is None))
            if made is not None:
                kept.append(made | {"set": file.parent.name})
    if not kept:
        raise UserError(f"{path} holds no question that ends with 'Answer format: ' and its choices ({counts})")
    return kept, counts


def _choice(row: Mapping[str, Any]) -> dict[str, Any] | None:
    instruction, output, answer = (as_text(row.get(name)).strip() for name in COLUMNS)
    found = FORMAT.search(instruction)
    choices = found[1].split("/") if found else []
    if answer not in choices or answer not in output or len(set(choices)) < 2:
        return None
    others = [choice for choice in dict.fromkeys(choices) if choice != answer]
    before, _, after = output.rpartition(answer)
    return {
        "prompt": alpaca_prompt(instruction, as_text(row.get("input"))),
        "chosen": output,
        "rejected": [before + other + after for other in others],
        "choices": [answer, *others],
    }


def written_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names first, whatever its case; None where it names none."""
    names = sorted(choices, key=len, reverse=True)
    found = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", text, re.IGNORECASE)
    return None if found is None else next(name for name in names if name.casefold() == found[0].casefold())


class ChoiceTask(PreferenceTask):
    """A :class:`rankwise.tasks.task.Task` over questions with choices.

    Attributes:
        columns: ``accuracy``, the share of questions whose right answer is the most probable; where ``tokens`` are
            given, ``accuracy written``, the share in which what the model writes (greedy) names the right choice
            first, as the papers measure it, and ``answered``, the share in which it names any; ``loss`` of the right
            answers' tokens, in nats; and the accuracies of each set, where there are several. The first are then the
            means over sets.
    """

    kind = "choices"

    def __init__(
        self,
        train: Rows,
        held_out: Rows,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        counts: dict[str, int],
        seed: int,
        tokens: int | None,
    ) -> None:
        """As :class:`PreferenceTask`; ``tokens`` are the most that the model writes, None for no writing."""
        super().__init__(train, held_out, tokenizer, model, context, counts, seed)
        if tokens is not None and tokens >= context:
            raise UserError(f"data.tokens {tokens} leaves no room for a question in a context of {context}: lower it")
        self._tokens = tokens
        self._sources: dict[int, Mapping[str, Any]] = {}
        for part, rows, sources in (("training", self._rows, train), ("held-out", self._held_out, held_out)):
            texts = [source["prompt"] for source in sources]
            prompts, cut = fit_prompts(tokenizer, texts, context - tokens) if tokens else ([None] * len(texts), 0)
            count(self.counts, f"{part} {CUT_TO_WRITE}", cut)
            pairs = zip(rows, sources, prompts, strict=True)
            self._sources |= {id(row): {**source, "ids": ids} for row, source, ids in pairs}
        self._sets = sorted({str(row["set"]) for row in held_out})
        shares = SHARES if tokens else SHARES[:1]
        each = [f"{share} {name}" for name in self._sets for share in shares[:2]] if len(self._sets) > 1 else []
        self.columns = (*shares, "loss", *each)

    def evaluate(self, model: nn.Module) -> Measurement:
        """Every held-out question, by sets."""
        return Measurement(self._by_sets(model, self._held_out))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._by_sets(model, sample(self._rows, limit, seed)[0])

    def _by_sets(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Metrics:
        sets: dict[str, list[PreferenceRow]] = {}
        for row in rows:
            sets.setdefault(str(self._sources[id(row)]["set"]), []).append(row)
        each = {name: self._choices(model, some) for name, some in sets.items()}
        tokens = {name: sum(len(row.answers[0]) for row in some) for name, some in sets.items()}
        shares = [share for share in SHARES if share in self.columns]
        found = {share: sum(one[share] for one in each.values()) / len(each) for share in shares}
        loss = sum(each[name]["loss"] * tokens[name] for name in sets) / sum(tokens.values())
        named = {f"{share} {name}": value for name, one in each.items() for share, value in one.items()}
        return found | {"loss": loss} | {name: value for name, value in named.items() if name in self.columns}

    def _choices(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Metrics:
        measured = self._measured(model, rows)
        return {name: measured[name] for name in ("accuracy", "loss")} | self._written(model, rows)

    def _written(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Metrics:
        if self._tokens is None:
            return {}
        sources = [self._sources[id(row)] for row in rows]
        texts = generate_answers(model, self._tokenizer, [source["ids"] for source in sources], self._tokens)
        choices = [source["choices"] for source in sources]
        named = [written_choice(text, some) for text, some in zip(texts, choices, strict=True)]
        right = sum(name == some[0] for name, some in zip(named, choices, strict=True))
        return {WRITTEN[0]: right / len(rows), WRITTEN[1]: sum(name is not None for name in named) / len(rows)}
