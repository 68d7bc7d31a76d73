"""Regular expressions in adapters and recipes: right, wrong, and made to take for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import small_runs
import tiny
import tiny_starts
from rankwise.adapters import load_adapter_folder
from rankwise.analysis.ranks import read_ranks
from rankwise.directions import initialise
from rankwise.errors import UserError
from rankwise.files import MANIFEST
from rankwise.methods import with_adapter
from rankwise.peft_bridge import patterns
from rankwise.peft_bridge.patterns import check_patterns

NAMES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(24) for part in "qkvo"]
FOR_EVER = ["(([a-z0-9_.])+)+X", "([a-z0-9_.]*)*X", r"(\w+\.?)+X"]
REAL = [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    r".*\.(q|v)_proj$",
    "all-linear",
]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_are_in_use_are_taken(pattern: str) -> None:
    check_patterns({"target_modules": pattern, "exclude_modules": None, "rank_pattern": {pattern: 2}}, NAMES)


@pytest.mark.parametrize(
    ("key", "pattern"),
    [*((key, FOR_EVER[0]) for key in patterns.FORMS), *(("target_modules", pattern) for pattern in FOR_EVER[1:])],
)
def test_one_that_takes_for_ever_is_named(key: str, pattern: str) -> None:
    value: Any = {"[a-z]+": 1, pattern: 3} if key.endswith("_pattern") and key != "layers_pattern" else pattern
    with pytest.raises(UserError, match=rf"here: {key} .*X'? takes more than 1 s on the names of the model's modules"):
        check_patterns({key: value}, NAMES, "here: ")


@pytest.mark.parametrize("pattern", ["q_proj(", "*", "[a", "q_proj\\", r"\q_proj", "(?i)q_proj"])
def test_what_is_no_pattern_is_told(pattern: str) -> None:
    with pytest.raises(UserError, match=r"rank_pattern .* is no regular expression"):
        check_patterns({"rank_pattern": {pattern: 2}}, NAMES)


def test_flags_stand_where_the_pattern_is_taken_by_itself() -> None:
    check_patterns({"target_modules": r"(?i).*\.Q_PROJ"}, NAMES)
    with pytest.raises(UserError, match="takes more than 1 s"):
        check_patterns({"target_modules": "(?i)(([A-Z0-9_.])+)+!"}, NAMES)


def test_an_interpreter_that_is_slow_to_begin_is_no_slow_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "CODE", f"import time\ntime.sleep(2)\n{patterns.CODE}")
    check_patterns({"target_modules": REAL[0]}, NAMES)


def test_lists_are_names() -> None:
    check_patterns({"target_modules": ["q_proj(", FOR_EVER[0]]}, NAMES)


def test_adapters_recipes_and_starts_are_looked_at(tmp_path: Path, model_folder: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.make("llama").save_pretrained(base)
    initialise(str(base), adapter, tiny_starts.settings())
    (adapter / MANIFEST).unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {FOR_EVER[0]: 3}}))
    for read in (read_ranks, lambda folder: load_adapter_folder(folder, str(base))):
        with pytest.raises(UserError, match=r"adapter_config.json: rank_pattern .* takes more than 1 s"):
            read(adapter)
    shutil.rmtree(adapter)
    with pytest.raises(UserError, match=r"target_modules .* takes more than 1 s"):
        initialise(str(base), adapter, tiny_starts.settings(target_modules=FOR_EVER[0]))
    recipe = small_runs.recipe("text", tmp_path, model_folder, adapter={"kind": "lora", "target_modules": FOR_EVER[0]})
    with pytest.raises(UserError, match=r"adapter\.target_modules .* takes more than 1 s"):
        with_adapter(tiny.make("llama"), recipe, "CAUSAL_LM")
