"""Evaluations between and before trainings."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from test_preference_trainer import METRICS, ROWS, batch_of, logged, trainer


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    """An adapter that is not at its start."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama, config).eval()


def test_evaluation_uses_the_reference_before_any_training(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "chosen": "?", "rejected": ["@", "%"]} for prompt in ("#", "!")]
    made = trainer(adapted, tiny_tokenizer, tmp_path, eval_dataset=rows)
    found = made.evaluate()
    assert found["eval_loss"] == pytest.approx(math.log(3), abs=1e-5)
    assert found["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_an_evaluation_is_over_its_own_rows_alone(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A loss that was computed in evaluation mode before it, of other rows, is not in its means."""
    made = trainer(adapted, tiny_tokenizer, tmp_path, eval_dataset=ROWS[:1])
    expected = made.evaluate()
    adapted.eval()
    made.compute_loss(adapted, batch_of(made))
    found = made.evaluate()
    assert [found[f"eval_{name}"] for name in METRICS] == [expected[f"eval_{name}"] for name in METRICS]


def test_an_evaluation_between_two_logs_keeps_the_training_apart(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With and without an evaluation after each step, the training's means over two steps are the same."""
    found = []
    for changes in ({}, {"eval_dataset": ROWS[:1], "eval_strategy": "steps", "eval_steps": 1.0}):
        made = trainer(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, max_steps=2, logging_steps=2.0, **changes)
        made.train()
        found.append([logged(made, name) for name in METRICS])
        assert len(logged(made, "eval_logps/chosen")) == (2 if changes else 0)
    assert found[0] == [pytest.approx(values) for values in found[1]]
    assert all(len(values) == 1 for values in found[0])
