from __future__ import annotations

import copy
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import small_runs
from rankwise import training
from rankwise.errors import UserError
from rankwise.optimisation import training_tools
from rankwise.preferences.datasets import BEYOND
from rankwise.progress import ProgressBar
from rankwise.ranks import SoraConfig, gates
from rankwise.run import Run
from rankwise.schema import LoraSettings, SftStage, SoftmaxDpoStage, SoraSettings
from rankwise.tokenise import AnswerCollator, encode_answers
from rankwise.training import AnswerTrainer, train_stage

# Answers of one to seven tokens, so that a mean over rows is not the mean over tokens.
PAIRS = [{"prompt": "#!" * (1 + number % 3), "completion": "?@%" * (number // 2) + "?"} for number in range(4)]


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama, settings).eval()


@pytest.fixture
def rows(tiny_tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    return encode_answers(PAIRS, tiny_tokenizer, 64)[0]


def trainer(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], folder: Path, **changes: Any
) -> AnswerTrainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(**settings | changes)
    return AnswerTrainer(model=model, args=arguments, train_dataset=rows, data_collator=AnswerCollator.of(tokenizer))


def mean_loss(model: nn.Module, rows: list[dict[str, list[int]]]) -> Tensor:
    """The mean over all answer tokens, row by row without padding."""
    sums = [
        nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:]),
            ignore_index=-100,
            reduction="sum",
        )
        for row in rows
    ]
    return torch.stack(sums).sum() / sum(label != -100 for row in rows for label in row["labels"])


def trained(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, folder: Path, stage: Any, rows: Any, **changes: Any
) -> dict[str, int]:
    console = changes.pop("console", None) or small_runs.silent()
    settings = {"adapter": LoraSettings(), "context": 64, "seed": 0, "bfloat16": False} | changes
    return train_stage(model, tokenizer, stage, rows, folder=folder, console=console, **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_that_of_the_mean_over_answer_tokens(
    adapted: PeftModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    tmp_path: Path,
    size: int,
    accumulation: int,
) -> None:
    """One step of plain gradient descent on all rows, however they are spread over batches."""
    expected = copy.deepcopy(adapted)
    loss = mean_loss(expected, rows)
    loss.backward()
    with torch.no_grad():
        for value in expected.parameters():
            if value.requires_grad:
                value.sub_(1e-2 * value.grad)
    before = trained(adapted)
    made = trainer(
        adapted,
        tiny_tokenizer,
        rows,
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(trained(adapted), trained(expected), atol=1e-6, rtol=0)
    assert float((trained(adapted) - before).abs().max()) > 1e-4


def test_the_loss_of_an_evaluation_is_the_mean_too(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    made = trainer(adapted, tiny_tokenizer, rows, tmp_path, per_device_eval_batch_size=4)
    found = made.evaluate(rows)
    assert found["eval_loss"] == pytest.approx(mean_loss(adapted, rows).item(), abs=1e-5)


def test_the_loss_of_one_of_several_processes(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """Gradients are averaged over processes while tokens are added up: each loss is multiplied by their number."""
    made = trainer(adapted, tiny_tokenizer, rows, tmp_path)
    made.accelerator = type("TwoProcesses", (), {"num_processes": 2})()
    halves = [AnswerCollator.of(tiny_tokenizer)(half) for half in (rows[:1], rows[1:])]
    tokens = torch.tensor(sum(label != -100 for row in rows for label in row["labels"]))
    losses = [made.compute_loss(adapted, half, num_items_in_batch=tokens).item() for half in halves]
    assert sum(losses) / 2 == pytest.approx(mean_loss(adapted, rows).item(), abs=1e-5)


def test_metrics_are_written_line_by_line(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    stage = SftStage(kind="sft", name="first", epochs=3.0, batch_size=2, learning_rate=1e-2)
    first = mean_loss(adapted, rows).item()
    assert train(adapted, tiny_tokenizer, tmp_path, stage, rows) == {}
    written = lines(tmp_path)
    assert [line["stage"] for line in written] == ["first"] * 7
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6, 6]
    assert all({"epoch", "loss", "learning_rate", "grad_norm"} <= set(line) for line in written[:6])
    assert "train_loss" in written[6]
    assert mean_loss(adapted, rows).item() < first
    train(adapted, tiny_tokenizer, tmp_path, stage.model_copy(update={"name": "second"}), rows)
    assert [line["stage"] for line in lines(tmp_path)] == ["first"] * 7 + ["second"] * 7


def test_long_stages_are_logged_fifty_times(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    stage = SftStage(kind="sft", name="sft", epochs=26.0, batch_size=1)
    train(adapted, tiny_tokenizer, tmp_path, stage, rows)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, *range(2, 105, 2)]


def test_a_sora_stage_logs_its_gates_and_makes_them_sparse(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    settings = SoraConfig(r=4, target_modules="all-linear", threshold=0.2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama, settings)
    stage = SftStage(kind="sft", name="sora", epochs=6.0, batch_size=4, learning_rate=1e-2)
    train(model, tiny_tokenizer, tmp_path, stage, rows, adapter=SoraSettings(r=4, threshold=0.2, gate_lr=0.05))
    left = [line["gates_left"] for line in lines(tmp_path) if "loss" in line]
    assert lines(tmp_path)[0]["gates"] == 4 * 14
    assert all(one >= other for one, other in itertools.pairwise(left))
    assert 0 < left[-1] < 0.7 * left[0]
    assert left[-1] == sum(int((gate != 0).sum()) for gate in gates(model).values())


def test_gates_have_a_learning_rate_of_their_own(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    tmp_path: Path,
) -> None:
    """Without a threshold and at a rate of almost nothing the gates stay where they are, while the rest is trained."""
    settings = SoraConfig(r=4, target_modules="all-linear", threshold=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama, settings)
    before = [gate.detach().clone() for gate in gates(model).values()]
    stage = SftStage(kind="sft", name="sora", epochs=3.0, batch_size=4, learning_rate=1e-2)
    train(model, tiny_tokenizer, tmp_path, stage, rows, adapter=SoraSettings(r=4, threshold=0.0, gate_lr=1e-12))
    torch.testing.assert_close(list(gates(model).values()), before, atol=1e-9, rtol=0)
    ups = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert all(up.detach().abs().max() > 1e-4 for up in ups)


def test_a_preference_stage_takes_only_its_negatives(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The first loss is log(1 + negatives), whatever the rows hold; what is cut or left out is counted."""
    rows = [{"prompt": "#" * length, "chosen": "?", "rejected": ["@", "%", "$"]} for length in (3, 9, 90)]
    for negatives in (1, 2):
        name = f"dpo-{negatives}"
        stage = SoftmaxDpoStage(kind="softmax_dpo", name=name, negatives=negatives, batch_size=3, warmup=0.0)
        counts = {"prompts cut to the context": 1, BEYOND: 3 * (3 - negatives)}
        assert train(adapted, tiny_tokenizer, tmp_path, stage, rows) == counts
        [first, *_] = [line for line in lines(tmp_path) if line["stage"] == name]
        assert first["loss"] == pytest.approx(math.log(1 + negatives), abs=1e-5)
        assert "rewards/margins" in first


@pytest.mark.parametrize("kind", ["sft", "softmax_dpo"])
def test_after_training_in_bfloat16_the_model_computes_in_float32(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: Any, tmp_path: Path, kind: str
) -> None:
    """What is measured after a stage, and between stages, is not computed under the trainer's autocast."""
    stage: Any = SftStage(name="one", kind="sft", epochs=1, batch_size=4, learning_rate=1e-3)
    if kind == "softmax_dpo":
        stage = SoftmaxDpoStage(name="one", kind="softmax_dpo", epochs=1, batch_size=4, learning_rate=1e-3)
        rows = [{"prompt": "The", "chosen": " fox", "rejected": [" dog"]}] * 4
    for _ in range(2):
        train(adapted, tiny_tokenizer, tmp_path, stage, rows, bfloat16=True)
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        found = adapted.eval()(input_ids=ids).logits
        expected = adapted.base_model(input_ids=ids).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sft", "softmax_dpo"])
def test_attention_is_never_given_bfloat16_on_a_cpu(
    adapted: PeftModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: Any,
    tmp_path: Path,
    kind: str,
    weights: torch.dtype,
) -> None:
    """Its gradients would take several times as long."""
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.scaled_dot_product_attention:
                seen.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else args[0].dtype)
            return func(*args, **(kwargs or {}))

    stage: Any = SftStage(name="one", kind="sft", epochs=1, batch_size=4, learning_rate=1e-3)
    if kind == "softmax_dpo":
        stage = SoftmaxDpoStage(name="one", kind="softmax_dpo", epochs=1, batch_size=4, learning_rate=1e-3)
        rows = [{"prompt": "The", "chosen": " fox", "rejected": [" dog"]}] * 4
    adapted.to(weights)
    with Watching():
        train(adapted, tiny_tokenizer, tmp_path, stage, rows, bfloat16=weights == torch.float32)
    assert seen and set(seen) == {torch.float32}


def test_bfloat16_trains_and_leaves_float32_parameters(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    first = mean_loss(adapted, rows).item()
    stage = SftStage(kind="sft", name="sft", epochs=10.0, batch_size=4, learning_rate=5e-2)
    train(adapted, tiny_tokenizer, tmp_path, stage, rows, bfloat16=True)
    assert {value.dtype for value in adapted.parameters()} == {torch.float32}
    assert mean_loss(adapted, rows).item() < first - 0.1


def test_the_seed_alone_decides(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    stage = SftStage(kind="sft", name="sft", epochs=2.0, batch_size=1, learning_rate=1e-2)
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(adapted)
        torch.manual_seed(len(found))
        train(model, tiny_tokenizer, tmp_path, stage, rows, seed=seed)
        found.append(trained(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_off_the_terminal_there_is_a_line_for_every_tenth(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    console = small_runs.silent()
    stage = SftStage(kind="sft", name="slow", epochs=10.0, batch_size=2)
    train(adapted, tiny_tokenizer, tmp_path, stage, rows, console=console)
    printed = small_runs.printed(console).splitlines()
    assert [line.split(",")[0] for line in printed] == [f"slow: {step}/20 steps" for step in range(2, 21, 2)]
    assert all(re.search(r"loss \d+\.\d{3}, \d+ rows/s, \d+ s left$", line) for line in printed)
    assert printed[-1].endswith(" 0 s left")


@pytest.mark.parametrize("kind", ["sft", "softmax_dpo"])
def test_on_a_terminal_there_is_a_bar(
    adapted: PeftModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    tmp_path: Path,
    kind: str,
) -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=120, _environ={})
    stage: Any = SftStage(kind="sft", name="stage", batch_size=2)
    if kind == "softmax_dpo":
        stage = SoftmaxDpoStage(kind="softmax_dpo", name="stage", batch_size=2)
        rows = [{"prompt": "#", "chosen": "?", "rejected": ["@", "%", "$"]}] * 4  # type: ignore[dict-item]
    train(adapted, tiny_tokenizer, tmp_path, stage, rows, console=console)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", small_runs.printed(console))
    assert "stage" in text
    assert "2/2 steps, loss" in text


def test_a_bar_can_be_shown_before_its_length_is_known() -> None:
    console = Console(force_terminal=True, file=io.StringIO(), width=120, _environ={})
    with ProgressBar("[/waiting]", console).progress:
        pass
    assert "[/waiting]" in small_runs.printed(console)


def test_lora_plus_trains_b_faster(adapted: PeftModel) -> None:
    """Every B has the ratio's share of the rate; every trained parameter is in one group."""
    stage = SftStage(kind="sft", learning_rate=1e-3, weight_decay=0.1)
    assert training_tools(adapted, stage, LoraSettings(), 10).optimizer is None
    made = training_tools(adapted, stage, LoraSettings(lora_plus_ratio=8), 10).optimizer
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (8e-3 if "lora_B" in name else 1e-3, 0.1)


def test_training_is_logged_to_tensorboard_with_what_callbacks_add(model_folder: Path, tmp_path: Path) -> None:
    """SoRA's callback adds how many gates are left."""
    recipe = small_runs.recipe("classification", tmp_path, model_folder, log_to=["tensorboard"])
    Run(recipe, small_runs.silent())()
    [events] = (tmp_path / "run" / "runs").rglob("events.out.tfevents.*")
    written = events.read_bytes()
    assert b"train/loss" in written
    assert b"gates" in written


def test_a_tracker_that_is_not_installed_is_told_before_slow_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    recipe = small_runs.recipe("classification", tmp_path, model_folder, log_to=["wandb"])
    with pytest.raises(UserError, match="log_to wandb is not installed: pip install wandb"):
        Run(recipe, small_runs.silent())
