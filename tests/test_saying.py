"""What is said on a console is shown to the letter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rankwise
import small_runs
from rankwise.cli import main
from rankwise.saying import say


def test_brackets_are_no_markup() -> None:
    console = small_runs.silent()
    say(console, "no [/INST] in [q_proj]", dim=True)
    assert small_runs.printed(console) == "no [/INST] in [q_proj]\n"


def test_a_line_stays_one() -> None:
    console = small_runs.silent()
    path = "a folder/" * 50
    say(console, f"report: {path}")
    assert small_runs.printed(console) == f"report: {path}\n"


def test_texts_are_said_by_it_alone() -> None:
    """No other call prints a string."""
    for path in Path(rankwise.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("console.print"):
                assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{path}:{call.lineno}"


def test_names_in_a_table_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.[red].[/INST].lora_{}.weight"
    weights = {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    assert main(["inspect", str(tmp_path)]) == 0
    assert "[red].[/INST]" in capsys.readouterr().out
