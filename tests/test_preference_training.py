"""Whole trainings: against TRL's, in several forms of batches, stopped and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import rankwise as rw
from rankwise.errors import UserError
from rankwise.preferences import reference_values

SYMBOLS = "?@%+*=&$!~^"


def rows(count: int, negatives: int) -> list[dict[str, Any]]:
    """Prompts and answers of one to four symbols, with more than one row's worth of shared beginnings."""
    generator = torch.Generator().manual_seed(3)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return "".join(SYMBOLS[int(i)] for i in torch.randint(0, len(SYMBOLS), (length,), generator=generator))

    made = []
    for _ in range(count):
        answers: list[str] = []
        while len(answers) <= negatives:
            answer = text(4)
            answers += [answer] if answer not in answers else []
        made.append({"prompt": text(9), "chosen": answers[0], "rejected": answers[1:]})
    return made


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama, config)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "beta": 0.5,
        "seed": 5,
    }
    return common | changes


def logged(made: Any, name: str = "loss") -> list[float]:
    return [line[name] for line in made.state.log_history if name in line]


def train(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, data: list[dict[str, Any]], **changes: Any
) -> rw.SoftmaxDPOTrainer:
    resume = changes.pop("resume", None)
    arguments = rw.SoftmaxDPOConfig(**settings(folder, **changes))
    made = rw.SoftmaxDPOTrainer(model, arguments, data, processing_class=tokenizer)
    made.train(resume_from_checkpoint=resume)
    return made


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])


def test_fifty_steps_with_one_negative_are_those_of_trl(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Same order of rows, same adapter, AdamW with a falling rate, clipped gradients; the adapter at the start is the
    reference, of which TRL keeps a copy.
    """
    data = rows(40, 1)
    model = copy.deepcopy(adapted)
    ours = train(model, tiny_tokenizer, tmp_path / "ours", data, max_steps=50)
    begun = [row | {"prompt": tiny_tokenizer.bos_token + row["prompt"], "rejected": row["rejected"][0]} for row in data]
    arguments = trl.DPOConfig(**settings(tmp_path / "theirs", max_steps=50, bf16=False, gradient_checkpointing=False))
    theirs = trl.DPOTrainer(
        adapted, args=arguments, train_dataset=Dataset.from_list(begun), processing_class=tiny_tokenizer
    )
    theirs.train()
    found, expected = logged(ours), logged(theirs)
    assert len(found) == len(expected) == 50
    assert found == pytest.approx(expected, abs=1e-5)
    assert min(expected) < 0.85 * expected[0]
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-3, abs=1e-4)
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in adapted.named_parameters():
        if name in own:
            torch.testing.assert_close(own[name], value, atol=1e-4, rtol=1e-3)


def test_packed_trees_separate_sequences_and_wide_rows_are_one_training(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data, found = rows(24, 3), []
    for changes in ({}, {"prefix_tree": False}, {"tokens_per_row": 100}):
        made = train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, data, max_steps=12, **changes)
        found.append(logged(made))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("batches", [(2, 3), (1, 6), (4, 2)])
def test_each_row_weighs_the_same_in_accumulated_batches(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, batches: tuple[int, int]
) -> None:
    """Six rows, in one batch or in several of which the last one of (4, 2) has two: the same steps."""
    data = rows(6, 2)
    size, accumulation = batches
    found = []
    for changes in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation},
    ):
        model = copy.deepcopy(adapted)
        made = train(model, tiny_tokenizer, tmp_path, data, max_steps=4, optim="sgd", learning_rate=0.1, **changes)
        found.append((logged(made), logged(made, "rewards/margins"), weights(model)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)
    torch.testing.assert_close(found[1][2], found[0][2], atol=1e-6, rtol=1e-5)


def test_a_training_that_was_stopped_goes_on_to_the_bit(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Stopped in the middle of the second pass, dropout on; the resumed model begins where the first one did."""
    for name, module in adapted.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = nn.Dropout(0.2)
    data = rows(20, 3)
    whole, part, rest = (copy.deepcopy(adapted) for _ in range(3))
    first = train(whole, tiny_tokenizer, tmp_path / "whole", data, max_steps=9)
    saving = {"save_strategy": "steps", "save_steps": 7.0, "max_steps": 9}
    train(part, tiny_tokenizer, tmp_path / "part", data, **saving)
    checkpoint = str(tmp_path / "part" / "checkpoint-7")
    second = train(rest, tiny_tokenizer, tmp_path / "rest", data, max_steps=9, resume=checkpoint)
    assert torch.equal(weights(whole), weights(rest))
    assert logged(second) == logged(first)
    assert logged(second, "rewards/margins") == logged(first, "rewards/margins")
    assert not torch.equal(weights(whole), weights(adapted))
    train(whole, tiny_tokenizer, tmp_path / "more", data, max_steps=9, learning_rate=3e-2)
    with pytest.raises(UserError, match="checkpoint-7 was trained against another reference or on other rows"):
        train(whole, tiny_tokenizer, tmp_path / "moved", data, max_steps=9, resume=checkpoint)
    with pytest.raises(UserError, match="the same rows in the same order"):
        train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path / "other", data[::-1], max_steps=9, resume=checkpoint)


def test_a_reference_is_computed_once_and_found_by_the_next_training(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with fewer answers, in another order, need nothing but the sample that is compared; another model all."""
    computed: list[int] = []
    whole = reference_values.ReferenceValues._scored

    def counted(self: Any, model: nn.Module, data: Any) -> Any:
        computed.append(len(data))
        return whole(self, model, data)

    monkeypatch.setattr(reference_values.ReferenceValues, "_scored", counted)
    data = rows(12, 3)
    fewer = [row | {"rejected": row["rejected"][:2]} for row in data[::-1]]
    cached = {"max_steps": 3, "reference_cache": str(tmp_path / "cache")}
    plain = train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, fewer, max_steps=3)
    train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, data, **cached)
    again = train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, fewer, **cached)
    train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, data, reference="base", **cached)
    assert computed == [8, 12, 8, 12, 8, 0, 8, 12]  # eight each, to tell the reference by
    assert logged(again) == pytest.approx(logged(plain), abs=1e-6)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
