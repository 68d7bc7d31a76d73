"""Maths problems with worked solutions: GSM8K and MATH, trained on the solutions and measured by the final answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError, nearest
from rankwise.generation import generate_answers
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.answers import AnswerTask
from rankwise.tasks.language_loss import answer_loss
from rankwise.tasks.maths import check_library, final_answer, is_right
from rankwise.tasks.tables import as_text, columns_of, read_rows
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import ANSWERS_TOO_LONG, CUT_TO_WRITE, PROMPTS_CUT, encode_answer, fit_prompts

COLUMNS = (("question", "answer"), ("problem", "solution"))  # of GSM8K, and of MATH
UNUSABLE = "problems without a text or a solution"
UNREADABLE = "files that cannot be read"
UNANSWERED = "problems whose solution ends with no answer"


def read_problems(path: Path, template: str) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Read problems and their worked solutions; those without an answer at the end are dropped and counted.

    Args:
        path: a table (see :func:`rankwise.tasks.tables.read_rows`) with columns ``question`` and ``answer``, as GSM8K
            has them, or ``problem`` and ``solution``, as MATH has; or a folder of JSON files of one problem each, in
            any depth, as MATH is published.
        template: the prompt's wording, with ``{prompt}`` where the problem goes.

    Returns:
        Rows of ``prompt`` and ``completion``, and what was dropped.

    Raises:
        UserError: the file cannot be read, has other columns, or no problem is usable.
    """
    if "{prompt}" not in template:
        raise UserError(f"template {template!r} has no {{prompt}}, where the problem goes")
    rows, counts = _rows(path)
    problem, solution = _columns(path, columns_of(rows))
    kept = []
    for row in rows:
        text, worked = as_text(row.get(problem)), as_text(row.get(solution))
        reason = UNUSABLE if not text or not worked else None if final_answer(worked) else UNANSWERED
        if reason is None:
            kept.append({"prompt": template.replace("{prompt}", text), "completion": worked})
        else:
            count(counts, reason)
    if not kept:
        raise UserError(f"{path} holds no problem with a solution that ends with an answer ({counts})")
    return kept, counts


def _rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    if not path.is_dir():
        return read_rows(path)
    files = sorted(path.rglob("*.json"))
    if not files:
        raise UserError(f"{path} holds no .json file: give MATH's folder of problems, or a table's file")
    rows: list[dict[str, Any]] = []
    failed: list[UserError] = []
    for file in files:
        try:
            rows += read_rows(file)[0]
        except UserError as error:
            failed.append(error)
    if not rows:
        raise UserError(f"{path} holds no problem: {len(failed)} {UNREADABLE}, first {failed[0]}")
    return rows, {UNREADABLE: len(failed)} if failed else {}


def _columns(path: Path, present: set[str]) -> tuple[str, str]:
    for pair in COLUMNS:
        if present.issuperset(pair):
            return pair
    wanted = " and ".join(COLUMNS[0]), " and ".join(COLUMNS[1])
    raise UserError(f"{path} has neither {wanted[0]} nor {wanted[1]}: {nearest(COLUMNS[0][0], present)}")


class Problem(NamedTuple):
    """A problem's prompt as token ids, with room for what is written; its worked solution; and both as a row."""

    prompt: list[int]
    solution: str
    row: Mapping[str, Any]


class MathsTask(AnswerTask):
    """A :class:`rankwise.tasks.task.Task` over problems: the share solved, and the loss of the worked solutions.

    A problem is solved where the final answer of what the model writes (greedy) has the value of the solution's own
    (:mod:`rankwise.tasks.maths`).
    """

    columns: tuple[str, ...] = ("accuracy", "answered", "loss", "perplexity")

    def __init__(
        self,
        train: Sequence[Mapping[str, str]],
        held_out: Sequence[Mapping[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        counts: dict[str, int],
        tokens: int,
    ) -> None:
        """Encode the rows.

        Args:
            train: rows of ``prompt`` and ``completion`` to train on.
            held_out: rows to measure on.
            tokenizer: the model's.
            model: where the model is.
            context: most tokens of a row.
            counts: of what was read and dropped.
            tokens: most that the model writes for a solution.

        Raises:
            UserError: ``tokens`` leaves no room for a problem, no solution fits the context, or math-verify, which
                compares answers, is not installed.
        """
        check_library()
        if tokens >= context:
            raise UserError(f"data.tokens {tokens} leaves no room for a problem in a context of {context}: lower it")
        self._tokenizer, self._tokens, counts = tokenizer, tokens, dict(counts)
        self._problems = {
            name: _encoded(rows, tokenizer, context, tokens, name, counts)
            for name, rows in (("training", train), ("held-out", held_out))
        }
        made = {name: [problem.row for problem in found] for name, found in self._problems.items()}
        super().__init__("maths", made["training"], made["held-out"], model, counts)

    def evaluate(self, model: nn.Module) -> Measurement:
        """Share of held-out problems solved, share answered at all, and the loss of their solutions."""
        return self._solved(model, self._problems["held-out"])

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._solved(model, sample(self._problems["training"], limit, seed)[0]).metrics

    def _solved(self, model: nn.Module, problems: Sequence[Problem]) -> Measurement:
        texts = generate_answers(model, self._tokenizer, [problem.prompt for problem in problems], self._tokens)
        answered = [final_answer(text) is not None for text in texts]
        right = [is_right(text, problem.solution) for text, problem in zip(texts, problems, strict=True)]
        loss = answer_loss(model, [problem.row for problem in problems])
        shares = {"accuracy": sum(right) / len(right), "answered": sum(answered) / len(answered)}
        return Measurement(shares | {name: loss[name] for name in ("loss", "perplexity")})


def _encoded(
    rows: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokens: int,
    part: str,
    counts: dict[str, int],
) -> list[Problem]:
    """The problems whose solution fits the context; counts those that do not, and prompts that are cut."""
    prompts, cut = fit_prompts(tokenizer, [row["prompt"] for row in rows], context - tokens)
    count(counts, f"{part} {CUT_TO_WRITE}", cut)
    kept = []
    for row, prompt in zip(rows, prompts, strict=True):
        made = encode_answer(tokenizer, row["prompt"], row["completion"], context)
        count(counts, f"{part} {ANSWERS_TOO_LONG}", int(made is None))
        if made is not None:
            count(counts, f"{part} {PROMPTS_CUT}", int(made.prompt_cut))
            kept.append(Problem(prompt, row["completion"], made.features()))
    if not kept:
        raise UserError(f"no {part} solution fits the context of {context} tokens: all are longer")
    return kept
