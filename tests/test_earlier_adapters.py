"""Adapters that earlier versions of rankwise saved (`scripts/adapter_fixtures.py`) load, and compute what they did."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankwise.cli import main
from rankwise.directions import load_checkpoint
from rankwise.ranks import SoraConfig

HOME = Path(__file__).parent / "adapters"
FOLDERS = sorted(path.parent for path in HOME.glob("*/*/adapter_config.json"))
SCRIPT = Path(__file__).parent.parent / "scripts" / "adapter_fixtures.py"


@pytest.fixture(scope="module")
def script() -> Any:
    found = importlib.util.spec_from_file_location("adapter_fixtures", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def ids(folder: Path) -> str:
    return str(folder.relative_to(HOME))


def test_there_are_adapters_of_each_kind_and_version() -> None:
    assert len({folder.parent for folder in FOLDERS}) >= 5 and len(FOLDERS) >= 28


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_an_earlier_adapter_computes_what_it_did(folder: Path, script: Any) -> None:
    expected = load_file(folder.parent / "expected.safetensors")[folder.name.removesuffix("-export")]
    model = peft.PeftModel.from_pretrained(script.base(), folder).eval()
    assert isinstance(model.peft_config["default"], SoraConfig) == (folder.name in ("sora", "milora_sora"))
    with torch.no_grad():
        found = model(input_ids=script.TOKENS).logits
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder.name == "milora"], ids=ids)
def test_training_goes_on_from_an_earlier_checkpoint(folder: Path, script: Any) -> None:
    """The start is known again: the loss falls from where it was."""
    model = load_checkpoint(script.base(), folder, is_trainable=True)
    with torch.no_grad():
        begun = model(input_ids=script.TOKENS).logits
    torch.testing.assert_close(begun, load_file(folder.parent / "expected.safetensors")["milora"], atol=2e-6, rtol=1e-5)
    losses = []
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(4):
        losses.append(model(input_ids=script.TOKENS, labels=script.TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder.parent.name == "0.1.0"], ids=ids)
def test_an_earlier_adapter_is_inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    assert "q_proj" in capsys.readouterr().out
