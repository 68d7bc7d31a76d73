from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from rankwise import softmax_dpo_loss
from rankwise.errors import UserError


def inputs(batch: int = 5, negatives: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Log-probabilities: policy and reference, chosen and rejected, in the order of the loss's arguments."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch,), (batch, negatives)] * 2
    return [-30 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_three_negatives_by_hand():
    """Chosen gains log 2 on the reference, the rejected gain 0, log 2 and -log 2; beta 1.

    Margins -log 2, 0, -2 log 2: sum of exponentials 1/2 + 1 + 1/4 = 7/4, so the loss is log(1 + 7/4) = log(11/4).
    At beta 2 the exponentials are 1/4 + 1 + 1/16 = 21/16, so it is log(37/16).
    """
    step = math.log(2)
    chosen, reference_chosen = torch.tensor([-1.0 + step]), torch.tensor([-1.0])
    rejected = torch.tensor([[-3.0, -4.0 + step, -5.0 - step]])
    reference_rejected = torch.tensor([[-3.0, -4.0, -5.0]])
    for beta, expected in ((1.0, math.log(11 / 4)), (2.0, math.log(37 / 16))):
        found = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
        assert found.shape == (1,)
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_as_the_paper_writes_it():
    """-log sigmoid(-log sum_j exp(margin_j)), where that does not overflow."""
    chosen, rejected, reference_chosen, reference_rejected = inputs()
    margins = 0.3 * ((rejected - reference_rejected) - (chosen - reference_chosen)[:, None])
    expected = -logsigmoid(-torch.log(torch.exp(margins).sum(1)))
    found = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_one_negative_it_is_the_sigmoid_loss_of_dpo(dtype):
    chosen, rejected, reference_chosen, reference_rejected = inputs(64, 1, dtype)
    difference = (chosen - rejected[:, 0]) - (reference_chosen - reference_rejected[:, 0])
    for beta in (0.05, 0.1, 1.0):
        found = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
        torch.testing.assert_close(found, -logsigmoid(beta * difference), atol=1e-6, rtol=1e-6)


def answer_logps(model, batch) -> torch.Tensor:
    """Summed log-probabilities of each row's answer, from the logits of a plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:]
    each = torch.log_softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def test_equals_the_loss_of_trl(tmp_path, tiny_llama, tiny_tokenizer):
    """What TRL's trainer returns for its own batch, on a policy that has left the reference."""
    rows = [
        {"prompt": "Question: ", "chosen": "four.", "rejected": "The lazy dog."},
        {"prompt": "Once upon a time ", "chosen": "there was a river", "rejected": "two"},
        {"prompt": "A small model ", "chosen": "learns", "rejected": "jumps over the lazy dog"},
    ]
    reference = type(tiny_llama)(tiny_llama.config).eval()
    reference.load_state_dict(tiny_llama.state_dict())
    settings = DPOConfig(
        tmp_path, beta=0.7, per_device_train_batch_size=3, report_to="none", use_cpu=True, bf16=False, max_length=64
    )
    trainer = DPOTrainer(
        tiny_llama, reference, settings, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = float(trainer.compute_loss(tiny_llama.eval(), dict(batch)).detach())
    policy_chosen, policy_rejected = answer_logps(tiny_llama, batch).chunk(2)
    reference_chosen, reference_rejected = answer_logps(reference, batch).chunk(2)
    assert (policy_chosen - reference_chosen).abs().max() > 0.05
    found = softmax_dpo_loss(
        policy_chosen, policy_rejected[:, None], reference_chosen, reference_rejected[:, None], 0.7
    ).mean()
    assert float(found) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - math.log(2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [1e4, -1e4, 89.0, -120.0])
def test_finite_at_any_margin(margin, dtype):
    """Large and positive: the loss is the margin plus log 3 and the gradient 1; large and negative: both vanish."""
    chosen = torch.zeros(1, dtype=dtype, requires_grad=True)
    rejected = torch.full((1, 3), margin, dtype=dtype, requires_grad=True)
    loss = softmax_dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1, 3), 1.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    exact = float(rejected[0, 0].detach()) + math.log(3) if margin > 0 else 0.0
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-6, abs=1e-30)
    assert float(chosen.grad) == pytest.approx(-1.0 if margin > 0 else 0.0, abs=2e-3)
    expected = torch.full((1, 3), 1 / 3 if margin > 0 else 0.0)
    torch.testing.assert_close(rejected.grad.float(), expected, atol=2e-3, rtol=0)


def test_half_precision_inputs_are_subtracted_in_float32():
    """Neighbours of -1000 are 4 apart in bfloat16, so a difference of 1.5 to the reference would be lost there."""
    chosen = torch.tensor([-1000.0], dtype=torch.bfloat16)
    found = softmax_dpo_loss(chosen, torch.tensor([[-1000.0]]), torch.tensor([-1001.5]), torch.tensor([[-1000.0]]), 1.0)
    assert float(found) == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-6)


def test_masked_negatives_equal_leaving_them_out():
    chosen, rejected, reference_chosen, reference_rejected = inputs(4, 3)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [True, True, False]])
    rejected = torch.where(mask, rejected, torch.nan).requires_grad_()
    chosen.requires_grad_()
    masked = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.4, mask)
    gradients = torch.autograd.grad(masked.sum(), (chosen, rejected))
    for row, kept in enumerate(mask):
        one = chosen[row : row + 1].detach().requires_grad_()
        left = rejected[row, kept].detach()[None].requires_grad_()
        alone = softmax_dpo_loss(one, left, reference_chosen[row : row + 1], reference_rejected[row, kept][None], 0.4)
        alone.sum().backward()
        torch.testing.assert_close(masked[row : row + 1], alone)
        torch.testing.assert_close(gradients[0][row : row + 1], one.grad)
        torch.testing.assert_close(gradients[1][row, kept], left.grad[0])
        assert (gradients[1][row, ~kept] == 0).all()


def test_order_of_the_negatives_does_not_matter_and_more_of_them_cost_more():
    chosen, rejected, reference_chosen, reference_rejected = inputs(6, 4)
    order = torch.tensor([2, 0, 3, 1])
    loss = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.5)
    again = softmax_dpo_loss(chosen, rejected[:, order], reference_chosen, reference_rejected[:, order], 0.5)
    fewer = softmax_dpo_loss(chosen, rejected[:, :3], reference_chosen, reference_rejected[:, :3], 0.5)
    torch.testing.assert_close(loss, again)
    assert (loss > fewer).all()


def test_gradients_agree_with_finite_differences():
    values = [value.requires_grad_() for value in inputs(3, 3)]
    mask = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    assert torch.autograd.gradcheck(lambda *v: softmax_dpo_loss(*v, 0.2), values)
    assert torch.autograd.gradcheck(lambda *v: softmax_dpo_loss(*v, 0.2, mask), values)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_above_zero(beta):
    with pytest.raises(UserError, match=f"beta {beta} is not possible: it must be above 0"):
        softmax_dpo_loss(*inputs(), beta)


def test_every_row_needs_a_negative():
    with pytest.raises(UserError, match="at least one in each row"):
        softmax_dpo_loss(*inputs(2, 0), 1.0)
    with pytest.raises(UserError, match="at least one in each row"):
        softmax_dpo_loss(*inputs(2, 2), 1.0, torch.tensor([[True, False], [False, False]]))
