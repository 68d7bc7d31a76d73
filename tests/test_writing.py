"""Answers that a finished run writes to a file of instructions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import small_runs
from rankwise import writing
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.evaluation import trained_stage
from rankwise.generation import generate_answers
from rankwise.models import load_tokenizer
from rankwise.recipes import load_recipe
from rankwise.run import Run
from rankwise.tasks.instructions import alpaca_prompt
from rankwise.tokenise import encode_prompt
from rankwise.writing import write_outputs

ROWS = [
    {"instruction": "Name it.", "input": "the red fox", "output": "reference", "dataset": "helpful", "id": 3},
    {"instruction": "Question: which is the blue river?", "dataset": "koala"},
]


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on Alpaca's form, whose recipe leaves it to be found."""
    folder = tmp_path_factory.mktemp("alpaca")
    rows = [
        {"instruction": f"Name {thing}.", "input": "", "output": f"The {thing}."} for thing in small_runs.THINGS * 2
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    data = {"kind": "instructions", "train": str(folder / "rows.json")}
    recipe = small_runs.recipe("instructions", folder, model_folder, data=data, stages=[small_runs.SFT | {"epochs": 1}])
    Run(recipe, small_runs.silent())()
    return folder / "run"


def instructions(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "instructions.jsonl"


def test_outputs_are_in_alpacaevals_form(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model writes after the prompt that its rows had."""
    path, out = instructions(tmp_path, ROWS), tmp_path / "outputs.json"
    assert main(["write", str(run), str(path), str(out), "--tokens", "8", "--generator", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "answers": 2, "cut": 0, "counts": {}}
    recipe = load_recipe(run / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model.path)
    prompts = [alpaca_prompt("Name it.", "the red fox"), alpaca_prompt(ROWS[1]["instruction"])]
    encoded = [encode_prompt(tokenizer, prompt, 120) for prompt in prompts]
    texts = [text.strip() for text in generate_answers(trained_stage(run, recipe), tokenizer, encoded, 8)]
    assert json.loads(out.read_text()) == [
        {
            "instruction": "Name it.",
            "input": "the red fox",
            "dataset": "helpful",
            "output": texts[0],
            "generator": "mine",
        },
        {"instruction": ROWS[1]["instruction"], "dataset": "koala", "output": texts[1], "generator": "mine"},
    ]


@pytest.mark.parametrize(
    ("form", "template", "prompt"),
    [
        ("pairs", "Q: {prompt}\nA:", "Q: Do it.\n\nnow\nA:"),
        ("pairs", None, "Do it.\n\nnow"),
        ("chat", None, "<Do it.\n\nnow>"),
    ],
)
def test_prompts_are_worded_as_the_runs_rows(tiny_tokenizer: Any, form: str, template: str | None, prompt: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    rows = [{"instruction": "Do it.", "input": "now"}]
    assert writing._prompts(rows, Path("rows"), form, template, tokenizer) == [prompt]


def test_long_prompts_are_cut_and_counted(run: Path, tmp_path: Path) -> None:
    path, console = instructions(tmp_path, [{"instruction": "long " * 80}]), small_runs.silent()
    assert write_outputs(run, path, tmp_path / "out.json", console, tokens=8)["cut"] == 1
    assert "prompts cut to the context: 1" in small_runs.printed(console)


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ([{"instruction": ""}], 8, "row 1 has no instruction"),
        ([{"prompt": "a"}], 8, "has no column 'instruction'"),
        (ROWS, 128, "128 tokens are not possible: 1 or more, and below the context of 128"),
        (ROWS, 0, "0 tokens are not possible"),
    ],
)
def test_mistakes_leave_no_file(run: Path, tmp_path: Path, rows: Any, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_outputs(run, instructions(tmp_path, rows), tmp_path / "out.json", small_runs.silent(), tokens=tokens)
    assert not (tmp_path / "out.json").exists()


def test_where_nothing_can_be_written_is_told_before_the_base_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> None:
        raise AssertionError("slow work was begun")

    monkeypatch.setattr(writing, "trained_stage", slow)
    path = instructions(tmp_path, ROWS)
    for out, message in ((path / "out.json", "cannot be written"), (tmp_path, "is a folder: give the file to write")):
        with pytest.raises(UserError, match=message):
            write_outputs(run, path, out, small_runs.silent(), tokens=8)


def test_other_runs_write_nothing(model_folder: Path, tmp_path: Path) -> None:
    recipe = small_runs.recipe("text", tmp_path, model_folder, stages=[small_runs.SFT | {"epochs": 1}])
    Run(recipe, small_runs.silent())()
    with pytest.raises(UserError, match="a run on data of kind text: only one on instructions writes answers"):
        write_outputs(tmp_path / "run", instructions(tmp_path, ROWS), tmp_path / "out.json", small_runs.silent())
