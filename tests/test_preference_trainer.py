from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import rankwise as rw
from rankwise.errors import UserError
from rankwise.preferences.batches import BatchMaker, answer_totals, by_answer
from rankwise.preferences.rows import PreferenceRow
from rankwise.tokenise import encode_answer

ROWS: list[dict[str, Any]] = [
    {"prompt": "#!#", "chosen": "?@?", "rejected": ["@", "%%%"]},
    {"prompt": "$", "chosen": "&", "rejected": ["+", "*", "+*", "=="]},
    {"prompt": "#!#!#!#", "chosen": "?@", "rejected": ["@@"]},
    {"prompt": "!!", "chosen": "=", "rejected": ["?", "%", "@"]},
]
METRICS = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
]


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    """An adapter that is not at its start: it changes the base."""
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama,
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    return model.eval()


def moved(model: nn.Module) -> nn.Module:
    """A copy whose weights are a little different."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return copied


def settings(folder: Path, **changes: Any) -> rw.SoftmaxDPOConfig:
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "logging_steps": 1.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
        "use_cpu": True,
    }
    return rw.SoftmaxDPOConfig(**common | changes)


def trainer(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, rows: Any = None, **changes: Any
) -> rw.SoftmaxDPOTrainer:
    ours = {name: changes.pop(name) for name in ("ref_model", "eval_dataset") if name in changes}
    rows = ROWS if rows is None else rows
    return rw.SoftmaxDPOTrainer(model, settings(folder, **changes), rows, processing_class=tokenizer, **ours)


def total(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> Tensor:
    """Log-probability of one answer, read off one whole sequence without padding."""
    row = encode_answer(tokenizer, prompt, answer, 256)
    assert row is not None
    ids, first = torch.tensor([row.input_ids]), row.labels.count(-100)
    logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logs.gather(1, ids[0, 1:, None])[first - 1 :].sum()


def expected_loss(policy: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerFast, beta: float) -> Tensor:
    """The mean of log(1 + sum_j exp(beta ((r_j - ref_j) - (c - ref_c)))), answer by answer."""
    losses = []
    for row in ROWS:
        with torch.no_grad():
            base = [total(reference, tokenizer, row["prompt"], text) for text in (row["chosen"], *row["rejected"])]
        own = [total(policy, tokenizer, row["prompt"], text) for text in (row["chosen"], *row["rejected"])]
        ratios = [one - other for one, other in zip(own, base, strict=True)]
        losses.append(torch.log1p(sum(torch.exp(beta * (ratio - ratios[0])) for ratio in ratios[1:])))
    return torch.stack(losses).mean()


def logged(made: rw.SoftmaxDPOTrainer, name: str = "loss") -> list[float]:
    return [line[name] for line in made.state.log_history if name in line]


def batch_of(made: rw.SoftmaxDPOTrainer) -> dict[str, list[PreferenceRow]]:
    made.compute_reference()
    return made.data_collator(list(made.train_dataset))


def references(made: rw.SoftmaxDPOTrainer) -> Tensor:
    return by_answer([row.reference for row in batch_of(made)["rows"]], 0.0)


def answers(model: nn.Module, made: rw.SoftmaxDPOTrainer) -> Tensor:
    """Log-probabilities of the trainer's rows as separate sequences."""
    return answer_totals(model, BatchMaker(0, trees=False)(list(made.train_dataset)))


@pytest.mark.parametrize("negatives", [1, 3, 8])
def test_the_first_loss_is_log_of_one_plus_the_negatives(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, negatives: int
) -> None:
    rows = [{"prompt": "#", "chosen": "?", "rejected": ["@", "%", "+", "*", "=", "&", "$", "!"][:negatives]}] * 4
    made = trainer(adapted, tiny_tokenizer, tmp_path, rows)
    made.train()
    assert logged(made)[0] == pytest.approx(math.log(1 + negatives), abs=1e-5)
    assert logged(made, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reference", ["start", "base", "other"])
def test_loss_and_gradient_are_those_of_answers_one_by_one(
    adapted: PeftModel,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    reference: str,
) -> None:
    """Rows with one to four rejected answers in one batch; the policy has moved away from the start."""
    references = {"start": copy.deepcopy(adapted), "base": copy.deepcopy(adapted).unload(), "other": moved(tiny_llama)}
    given = references["other"] if reference == "other" else None
    source = "base" if reference == "base" else "start"
    made = trainer(adapted, tiny_tokenizer, tmp_path, reference=source, ref_model=given, beta=0.7)
    batch = batch_of(made)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.mul_(1.3)
    found = made.compute_loss(adapted, batch)
    found.backward()
    gradients = {name: value.grad.clone() for name, value in adapted.named_parameters() if value.requires_grad}
    adapted.zero_grad()
    expected = expected_loss(adapted, references[reference], tiny_tokenizer, 0.7)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    assert len(gradients) == 8
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(gradients[name], value.grad, atol=1e-5, rtol=1e-4)


def test_references_differ_as_their_models_do(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = {name: trainer(adapted, tiny_tokenizer, tmp_path, reference=name) for name in ("start", "base")}
    with torch.no_grad():
        start = answers(adapted, made["start"])
        with adapted.disable_adapter():
            base = answers(adapted, made["base"])
    torch.testing.assert_close(references(made["start"]), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(references(made["base"]), base, atol=1e-5, rtol=0)
    assert float((start - base).abs().max()) > 0.01


def test_the_adapter_is_on_again_after_a_base_reference(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids = torch.tensor([[3, 4, 5]])
    before = adapted(input_ids=ids).logits
    trainer(adapted, tiny_tokenizer, tmp_path, reference="base").compute_reference()
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_with_one_negative_it_is_the_loss_of_trl(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, beta: float
) -> None:
    """The begin token, which TRL leaves to the tokenizer, is written into its prompts; nothing here merges."""
    rows = [row | {"rejected": row["rejected"][:1]} for row in ROWS]
    policy, reference = moved(tiny_llama), tiny_llama
    made = trainer(copy.deepcopy(policy), tiny_tokenizer, tmp_path, rows, ref_model=reference, beta=beta)
    theirs = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=beta, report_to="none", use_cpu=True, bf16=False, disable_dropout=False
        ),
        train_dataset=Dataset.from_list(
            [row | {"prompt": tiny_tokenizer.bos_token + row["prompt"], "rejected": row["rejected"][0]} for row in rows]
        ),
        processing_class=tiny_tokenizer,
    )
    batch = theirs.data_collator(list(theirs.train_dataset))
    ours = BatchMaker(0, trees=False)(list(made.train_dataset))
    assert sorted(own_tokens(ours.input_ids, ours.attention_mask)) == sorted(
        own_tokens(batch["input_ids"], batch["attention_mask"])
    )
    expected = theirs.compute_loss(theirs.model, batch)
    found = made.compute_loss(made.model, batch_of(made))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert found.item() != pytest.approx(math.log(2), abs=1e-3)


def own_tokens(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def test_training_raises_the_margin_and_logs_it(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = trainer(adapted, tiny_tokenizer, tmp_path, max_steps=8, learning_rate=5e-2)
    made.train()
    losses, margins = logged(made), logged(made, "rewards/margins")
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    assert margins[-1] > margins[0] + 1
    assert logged(made, "rewards/accuracies")[-1] == 1
    assert all(name in made.state.log_history[0] for name in METRICS)
    differences = zip(logged(made, "rewards/chosen"), logged(made, "rewards/rejected"), strict=True)
    assert margins == pytest.approx([chosen - rejected for chosen, rejected in differences], abs=1e-5)


def mean_of_rejected(values: Tensor) -> Tensor:
    rows = zip(values, ROWS, strict=True)
    return torch.stack([row[1 : 1 + len(source["rejected"])].mean() for row, source in rows]).mean()


def test_metrics_by_hand(adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Means over rows, of the mean over a row's rejected answers; the chosen wins against all of a row or not."""
    made = trainer(adapted, tiny_tokenizer, tmp_path, reference="base", beta=0.5, max_steps=1, learning_rate=0.0)
    rewards = -0.5 * references(made)
    made.train()
    with torch.no_grad():
        policy = answers(adapted, made)
    rewards += 0.5 * policy
    wins = [
        all(row[0] > other for other in row[1 : 1 + len(source["rejected"])])
        for row, source in zip(rewards, ROWS, strict=True)
    ]
    expected = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": mean_of_rejected(rewards),
        "rewards/accuracies": torch.tensor(wins).float().mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": mean_of_rejected(policy),
    }
    for name, value in expected.items():
        assert logged(made, name) == pytest.approx([float(value)], abs=1e-5)


def test_accumulated_small_batches_take_the_step_of_a_large_one(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        model = copy.deepcopy(adapted)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer(model, tiny_tokenizer, tmp_path, optim="sgd", **changes).train()
        found.append(torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_a_dataset_of_the_datasets_library_is_taken(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = trainer(adapted, tiny_tokenizer, tmp_path, Dataset.from_list(ROWS), max_steps=1)
    made.train()
    assert len(logged(made)) == 1


def test_mistakes_are_named(
    tiny_llama: PreTrainedModel, adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"beta=0.0\) is not possible: it must be above 0"):
        settings(tmp_path, beta=0.0)
    unknown = settings(tmp_path)
    unknown.reference = "start-model"  # the types of a call are checked in tests before the value is
    with pytest.raises(UserError, match=r"reference='start-model'\) is not possible: start, base, none"):
        unknown.__post_init__()
    with pytest.raises(UserError, match="give it as processing_class"):
        rw.SoftmaxDPOTrainer(adapted, settings(tmp_path), ROWS)
    with pytest.raises(UserError, match="no preference row is left"):
        trainer(adapted, tiny_tokenizer, tmp_path, [])
    plain = copy.deepcopy(adapted).unload()
    with pytest.raises(UserError, match="'base' needs a model with an adapter"):
        trainer(plain, tiny_tokenizer, tmp_path, reference="base")


def test_counts_of_both_parts_are_kept(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long = {"prompt": "#!" * 20, "chosen": "?", "rejected": ["@"]}
    made = trainer(adapted, tiny_tokenizer, tmp_path, [long, *ROWS], eval_dataset=[long], max_length=16)
    assert made.counts == {"prompts cut to the context": 2}


def test_the_options_of_the_loss_by_hand(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Label smoothing, per-token log-probabilities and the chosen answer's cross-entropy, from log-probabilities."""
    options = {"label_smoothing": 0.2, "length_normalised": True, "sft_weight": 0.3, "beta": 2.0}
    made = trainer(adapted, tiny_tokenizer, tmp_path, reference="base", **options)
    found = made.compute_loss(adapted, batch_of(made)).item()
    with torch.no_grad():
        policy, reference = answers(adapted, made).double(), references(made).double()
    losses = []
    for row, own, base in zip(made.train_dataset, policy, reference, strict=True):
        lengths = torch.tensor([len(answer) for answer in row.answers])
        ratios = ((own - base)[: len(lengths)]) / lengths
        logits = 2.0 * ratios
        target = torch.full((len(lengths),), 0.2 / (len(lengths) - 1), dtype=torch.float64)
        target[0] = 0.8
        losses.append(-(target * logits.log_softmax(0)).sum() - 0.3 * own[0] / lengths[0])
    assert found == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_without_a_reference_the_policy_alone_counts(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = trainer(adapted, tiny_tokenizer, tmp_path, reference="none", beta=0.5)
    found = made.compute_loss(adapted, batch_of(made)).item()
    with torch.no_grad():
        policy = 0.5 * answers(adapted, made).double()
    rows = zip(policy, ROWS, strict=True)
    losses = [-values[: 1 + len(row["rejected"])].log_softmax(0)[0] for values, row in rows]
    assert found == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_a_model_that_takes_no_trees_gets_separate_sequences_and_one_warning(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer), num_key_value_heads=1, sliding_window=4, initializer_range=0.3, **sizes
    )
    model = MistralForCausalLM(config)
    with pytest.warns(UserWarning, match="own copy of the prompt: its sliding_window of 4 tokens is shorter"):
        made = trainer(model, tiny_tokenizer, tmp_path)
    found = made.compute_loss(moved(model), batch_of(made))
    assert found.item() == pytest.approx(expected_loss(moved(model), model, tiny_tokenizer, 1.0).item(), abs=1e-5)


def test_an_adapter_is_made_where_its_config_is_given(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    arguments = settings(tmp_path, max_steps=2)
    made = rw.SoftmaxDPOTrainer(tiny_llama, arguments, ROWS, processing_class=tiny_tokenizer, peft_config=config)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert isinstance(made.model, PeftModel)
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
