"""A finished run writes answers to a file of instructions, in the form that AlpacaEval reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from rankwise.analysis.results import read_results
from rankwise.chat_template import render, require_template
from rankwise.errors import UserError
from rankwise.evaluation import open_run, trained_stage
from rankwise.files import check_output, write_json
from rankwise.generation import generate_answers
from rankwise.models import context_limit, load_tokenizer
from rankwise.saying import say
from rankwise.schema import InstructionData
from rankwise.tasks.instructions import FORM_READ, alpaca_prompt
from rankwise.tasks.tables import as_text, read_rows, require_columns
from rankwise.tokenise import fit_prompts

KEPT = ("instruction", "input", "dataset", "datasplit")  # what AlpacaEval knows an instruction by


def write_outputs(
    run: Path,
    instructions: Path,
    out: Path,
    console: Console,
    *,
    tokens: int = 512,
    stage: str | None = None,
    generator: str | None = None,
) -> dict[str, Any]:
    """Answer each instruction, greedily, worded as the run's own rows were; writes a list of objects as JSON.

    Each has ``instruction`` (and ``input``, ``dataset`` and ``datasplit``, where it had them), ``output``, and
    ``generator``, as AlpacaEval's files do.

    Args:
        run: the folder of a run on instructions.
        instructions: a table (see :func:`rankwise.tasks.tables.read_rows`) with a column ``instruction``, and ``input``
            where there is material.
        out: the file to write.
        console: shows progress.
        tokens: most tokens of an answer.
        stage: whose adapter to take; the last one's where None.
        generator: what the answers are said to be from; the recipe's name where None.

    Returns:
        The file, the number of answers, and how many prompts were cut on the left to make room for them.

    Raises:
        UserError: it is no finished run on instructions, ``tokens`` leaves no room, a row has no instruction, or
            ``out`` cannot be written.
    """
    recipe = open_run(run)
    if not isinstance(recipe.data, InstructionData):
        raise UserError(f"{run} is a run on data of kind {recipe.data.kind}: only one on instructions writes answers")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the file to write")
    check_output(out)
    tokenizer = load_tokenizer(recipe.model.path)
    context = context_limit(recipe.model, tokenizer, recipe.virtual_tokens)
    if not 1 <= tokens < context:
        raise UserError(f"{tokens} tokens are not possible: 1 or more, and below the context of {context}")
    rows, counts = read_rows(instructions)
    require_columns(instructions, rows, ["instruction"])
    prompts = _prompts(rows, instructions, _form(run, recipe.data), recipe.data.template, tokenizer)
    encoded, cut = fit_prompts(tokenizer, prompts, context - tokens)
    model = trained_stage(run, recipe, stage)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing", total=len(prompts))
        outputs = generate_answers(
            model, tokenizer, encoded, tokens, advance=lambda number: progress.advance(task, number)
        )
    found = [
        {
            **{name: row[name] for name in KEPT if name in row},
            "output": text.strip(),
            "generator": generator or recipe.name,
        }
        for row, text in zip(rows, outputs, strict=True)
    ]
    write_json(out, found)
    say(console, f"{out}: {len(found)} answers")
    for what, number in {**counts, "prompts cut to the context": cut}.items():
        if number:
            say(console, f"  {what}: {number}")
    return {"file": str(out), "answers": len(found), "cut": cut, "counts": counts}


def _form(run: Path, data: InstructionData) -> str:
    """How the run's rows were written: as its recipe says, or as it was found then."""
    if data.form != "auto":
        return data.form
    counted = read_results(run).get("counts") or {}
    forms = [name.removeprefix(FORM_READ) for name in counted if name.startswith(FORM_READ)]
    return forms[0] if forms else "alpaca"


def _prompts(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    form: str,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    made = []
    for number, row in enumerate(rows, start=1):
        instruction, material = as_text(row.get("instruction")), as_text(row.get("input"))
        if not instruction:
            raise UserError(f"{path}: row {number} has no instruction: give each row one, or leave it out")
        made.append((instruction, material))
    if form == "alpaca":
        return [alpaca_prompt(*pair) for pair in made]
    texts = ["\n\n".join(filter(None, pair)) for pair in made]
    if form == "pairs":
        return [(template or "{prompt}").replace("{prompt}", text) for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return render(require_template(tokenizer, str(path)), chats, answer_follows=True)
