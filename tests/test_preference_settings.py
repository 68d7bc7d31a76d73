"""What the trainer refuses, and settings that change how a model is run but not what comes out."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import rankwise as rw
from rankwise.errors import UserError
from test_preference_trainer import ROWS, logged, moved, settings, trainer


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    """An adapter that is not at its start."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama, config).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5\) is not possible: from 0 to below 0.5"),
        ({"sft_weight": -1.0}, r"sft_weight=-1.0\) is not possible: it must be 0 or above"),
        ({"max_length": 1}, r"max_length=1\) is not possible: a prompt and an answer"),
        ({"tokens_per_row": 0}, r"tokens_per_row=0\) is not possible: it must be above 0"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(tmp_path, **change)


class Parts(dict[str, Any]):
    """Data sets by name; what iterates over it gets rows, as the types of a call are checked in tests."""

    def __iter__(self) -> Any:
        return iter(ROWS)


def test_hard_answers_are_not_mined_with_weights_that_are_spread_over_processes(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes would call the model in different numbers, and wait for each other for ever."""
    monkeypatch.setattr(LlamaForCausalLM, "is_distributed_loading_by_transformers", True)
    with pytest.raises(UserError, match="weights that are spread over processes would wait for all of them"):
        trainer(tiny_llama, tiny_tokenizer, tmp_path, negatives="hard", num_negatives=1)


def test_what_would_fail_late_or_be_ignored_is_refused(
    adapted: PeftModel, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make = functools.partial(rw.SoftmaxDPOTrainer, args=settings(tmp_path), processing_class=tiny_tokenizer)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="has an adapter already: leave peft_config out"):
        make(adapted, train_dataset=ROWS, peft_config=config)
    with pytest.raises(UserError, match="compute_metrics would never be called"):
        make(adapted, train_dataset=ROWS, compute_metrics=dict)
    with pytest.raises(UserError, match="eval_dataset is a mapping with one, two"):
        make(adapted, train_dataset=ROWS, eval_dataset=Parts({"one": ROWS, "two": ROWS}))
    long = [{"prompt": "#!" * 400, "chosen": "?", "rejected": ["@"]}]
    positions = tiny_llama.config.max_position_embeddings
    with pytest.raises(
        UserError, match=rf"has 803 tokens, and the model {positions} positions: max_length={positions}$"
    ):
        make(adapted, train_dataset=long)
    made = make(adapted, train_dataset=ROWS)
    with pytest.raises(UserError, match=r"there is no checkpoint in .* to resume from"):
        made.train(resume_from_checkpoint=True)
    adapted.requires_grad_(False)
    with pytest.raises(UserError, match="no weight of the model is trained"):
        made.train()


@pytest.mark.parametrize("drawn", [{}, {"negatives": "in-batch", "num_negatives": 1}])
def test_a_reference_that_is_no_number_is_refused(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    """Also where its values are computed step by step."""
    broken = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    made = trainer(moved(tiny_llama), tiny_tokenizer, tmp_path, ref_model=broken, **drawn)
    with pytest.raises(UserError, match=r"the reference gives \[nan.* as log-probabilities of the answers of row"):
        made.train()


def test_a_compiled_model_gets_its_positions(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        made = trainer(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, max_steps=2, **changes)
        made.train()
        found.append(logged(made))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_in_bfloat16_the_reference_is_bfloat16_too(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At the start the policy is the reference, to the bit."""
    made = trainer(adapted, tiny_tokenizer, tmp_path, bf16=True)
    made.train()
    made.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)
    assert logged(made, "rewards/chosen") == [0.0]
