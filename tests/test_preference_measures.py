from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise import softmax_dpo_loss
from rankwise.preferences.measures import preference_measures, ranking_measures
from rankwise.recommend.metrics import case_metrics, possible_ranks


def batch(
    rows: int = 6, answers: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference, and which answers exist: two at least, in any columns; NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-20 * torch.rand(rows, answers, generator=generator, dtype=torch.float64) for _ in range(2))
    exists = torch.rand(rows, answers, generator=generator) < 0.6
    exists[:, 0] = True
    exists[torch.arange(rows), torch.randint(1, answers, (rows,), generator=generator)] = True
    policy, reference = (torch.where(exists, values, torch.nan).to(dtype) for values in (policy, reference))
    return policy, reference, exists


def test_two_rows_by_hand() -> None:
    """Beta 1/2, and a third rejected answer that only the first row has.

    First row: log-ratios 2, -2, 4, 1, so rewards 1, -1, 2, 1/2: mean rejected 1/2, and the second of them wins. Its
    weights are those of exp(-1), exp(2), exp(1/2). Second row: rewards 0, -1, -1: margin 1, both weigh the same.
    """
    policy = torch.tensor([[-1.0, -5.0, -2.0, -9.0], [-4.0, -6.0, -7.0, 99.0]])
    reference = torch.tensor([[-3.0, -3.0, -6.0, -10.0], [-4.0, -4.0, -5.0, 99.0]])
    exists = torch.tensor([[True] * 4, [True, True, True, False]])
    found = preference_measures(policy, reference, exists, 0.5)
    weights = np.exp([-1, 2, 0.5]) / np.exp([-1, 2, 0.5]).sum()
    expected = {
        "rewards/chosen": [1.0, 0.0],
        "rewards/rejected": [0.5, -1.0],
        "rewards/margins": [0.5, 1.0],
        "rewards/accuracies": [0.0, 1.0],
        "logps/chosen": [-1.0, -4.0],
        "logps/rejected": [-16 / 3, -6.5],
        "negatives/effective": [math.exp(-(weights * np.log(weights)).sum()), 2.0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-6), name


def test_equal_rewards_are_no_success() -> None:
    values = torch.zeros(1, 3)
    found = preference_measures(values, values, torch.ones(1, 3, dtype=torch.bool), 1.0)
    assert found["rewards/accuracies"].tolist() == [0.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_effective_number_is_that_of_the_shares_in_the_gradient(weighted: bool) -> None:
    """With weights too, of which some are 0 and those of answers that do not exist are NaN."""
    policy, reference, exists = batch()
    rejected = policy[:, 1:].clone().requires_grad_()
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).double() + 0.1
    weights[0, int(exists[0, 1:].int().argmax())] = 0.0
    assert exists[0].sum() > 2
    given = torch.where(exists[:, 1:], weights, torch.nan) if weighted else None
    loss = softmax_dpo_loss(
        policy[:, 0], rejected, reference[:, 0], reference[:, 1:], 0.3, exists[:, 1:], weights=given
    )
    [gradient] = torch.autograd.grad(loss.sum(), rejected)
    found = preference_measures(policy, reference, exists, 0.3, given)["negatives/effective"]
    for row, value in enumerate(found.tolist()):
        shares = gradient[row][gradient[row] > 0].numpy()
        shares = shares / shares.sum()
        assert len(shares) == int(exists[row, 1:].sum()) - (weighted and row == 0)
        assert value == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_effective_number_goes_from_one_to_all_of_them_and_stays_finite(dtype: torch.dtype) -> None:
    policy = torch.zeros(3, 101, dtype=dtype)
    policy[1, 7] = 1e4
    policy[2, 1:] = -1e4
    exists = torch.ones(3, 101, dtype=torch.bool)
    found = preference_measures(policy, torch.zeros(3, 101), exists, 1.0)
    assert found["negatives/effective"].tolist() == pytest.approx([100, 1, 100], rel=1e-5)
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in found.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_row_has_the_same_values_alone_as_in_a_batch(dtype: torch.dtype) -> None:
    """So that means over rows do not depend on how rows are put into batches."""
    policy, reference, exists = batch(dtype=dtype)
    together = preference_measures(policy, reference, exists, 0.3) | ranking_measures(policy, exists)
    for row, kept in enumerate(exists):
        alone = (policy[row, kept][None], torch.ones(1, int(kept.sum()), dtype=torch.bool))
        own = preference_measures(alone[0], reference[row, kept][None], alone[1], 0.3) | ranking_measures(*alone)
        for name, values in together.items():
            torch.testing.assert_close(values[row : row + 1], own[name])
            assert values.isfinite().all()


def test_no_gradient_is_kept() -> None:
    policy, reference, exists = batch()
    found = preference_measures(policy.requires_grad_(), reference, exists, 1.0) | ranking_measures(policy, exists)
    assert not any(values.requires_grad for values in found.values())


def test_with_one_rejected_answer_the_means_are_those_of_trl(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"prompt": "Question: ", "chosen": "four.", "rejected": "The lazy dog."},
        {"prompt": "Once upon a time ", "chosen": "there was a river", "rejected": "two"},
        {"prompt": "A small model ", "chosen": "learns", "rejected": "jumps over the lazy dog"},
    ]
    torch.manual_seed(1)
    reference = type(tiny_llama)(tiny_llama.config).eval()
    config = trl.DPOConfig(tmp_path, beta=0.7, report_to="none", use_cpu=True, bf16=False)
    trainer = trl.DPOTrainer(
        tiny_llama, reference, config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(tiny_llama, dict(inputs))
    policy, other = (logps(model, inputs).reshape(2, 3).T for model in (tiny_llama, reference))
    found = preference_measures(policy, other, torch.ones(3, 2, dtype=torch.bool), 0.7)
    logged = trainer._metrics["eval"]
    names = [name for name in found if name != "negatives/effective"]
    assert [float(found[name].mean()) for name in names] == pytest.approx([logged[name][0] for name in names], abs=1e-4)
    assert abs(logged["rewards/margins"][0]) > 1e-2


@torch.no_grad()
def logps(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """Of each sequence's answer, from the logits of a plain forward pass."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (each * inputs["completion_mask"][:, 1:]).sum(1)


scores = st.lists(st.sampled_from([-3.0, -2.0, -1.0, -0.5]), min_size=2, max_size=9)


@settings(max_examples=200, deadline=None)
@given(scores=scores, missing=st.integers(0, 3))
def test_ranks_are_those_of_recommendation_with_the_worst_order_of_ties(scores: list[float], missing: int) -> None:
    exists = torch.tensor([[True] * len(scores) + [False] * missing])
    found = ranking_measures(torch.tensor([scores + [0.0] * missing]), exists)
    worst = possible_ranks(np.array(scores), 0)[-1]
    # Scores without ties that give the chosen answer this rank.
    untied = np.array([0.0, *range(1, worst), *range(-1, worst - len(scores) - 1, -1)])
    expected = case_metrics(untied, 0)
    assert {name: float(values) for name, values in found.items()} == {
        f"ranking/{name}": pytest.approx(expected[name]) for name in ("HR@1", "MRR", "NDCG@5")
    }


def test_a_score_that_is_nan_never_helps() -> None:
    policy = torch.tensor([[-1.0, math.nan, -2.0], [math.nan, -1.0, -2.0]])
    found = ranking_measures(policy, torch.ones(2, 3, dtype=torch.bool))
    assert found["ranking/HR@1"].tolist() == [0, 0]
    assert found["ranking/MRR"].tolist() == pytest.approx([1 / 2, 1 / 3])
