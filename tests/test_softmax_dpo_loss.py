from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from rankwise import softmax_dpo_loss
from rankwise.errors import UserError
from rankwise.preferences import loss as loss_module


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


@pytest.mark.parametrize(("loss_type", "smoothing", "count"), [("sigmoid", 0.0, 3), ("aot", 0.2, 1)])
def test_equals_the_loss_of_trl(tmp_path, tiny_llama, tiny_tokenizer, loss_type, smoothing, count):
    """What TRL's trainer returns for its own batch, on a policy that has left the reference.

    Its sigmoid loss knows no smoothing. Its "aot" sorts a batch's log-ratios, which leaves a batch of one as it is:
    then it is the sigmoid loss with smoothed labels.
    """
    rows = [
        {"prompt": "Question: ", "chosen": "four.", "rejected": "The lazy dog."},
        {"prompt": "Once upon a time ", "chosen": "there was a river", "rejected": "two"},
        {"prompt": "A small model ", "chosen": "learns", "rejected": "jumps over the lazy dog"},
    ][:count]
    reference = type(tiny_llama)(tiny_llama.config).eval()
    reference.load_state_dict(tiny_llama.state_dict())
    common = {"per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True, "bf16": False, "max_length": 64}
    config = DPOConfig(tmp_path, beta=0.7, loss_type=[loss_type], label_smoothing=smoothing, **common)
    trainer = DPOTrainer(
        tiny_llama, reference, config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer
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
    values = (policy_chosen, policy_rejected[:, None], reference_chosen, reference_rejected[:, None])
    found = softmax_dpo_loss(*values, 0.7, label_smoothing=smoothing).mean()
    assert float(found) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - math.log(2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("negatives", [1, 3, 100])
@pytest.mark.parametrize("margin", [1e4, -1e4, 89.0, -120.0])
def test_finite_at_any_margin(margin, negatives, dtype):
    """Large and positive: the loss is the margin plus log K and the gradient 1; large and negative: both vanish."""
    chosen = torch.zeros(1, dtype=dtype, requires_grad=True)
    rejected = torch.full((1, negatives), margin, dtype=dtype, requires_grad=True)
    loss = softmax_dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1, negatives), 1.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    exact = float(rejected[0, 0].detach()) + math.log(negatives) if margin > 0 else 0.0
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-6, abs=1e-30)
    assert float(chosen.grad) == pytest.approx(-1.0 if margin > 0 else 0.0, abs=2e-3)
    expected = torch.full((1, negatives), 1 / negatives if margin > 0 else 0.0)
    torch.testing.assert_close(rejected.grad.float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_what_is_masked_does_no_harm_with_any_option(margin, filling, dtype):
    """Two of 100 negatives exist; every tensor holds the filling elsewhere."""
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[:, [3, 70]] = True
    values = [torch.where(mask, value, filling).to(dtype).requires_grad_() for value in (margin, 0.0)]
    chosen = [torch.zeros(2, dtype=dtype, requires_grad=True) for _ in range(2)]
    weights = torch.where(mask, 2.0, filling).requires_grad_()
    given = [chosen[0], values[0], chosen[1], values[1]]
    loss = softmax_dpo_loss(*given, 1.0, mask, label_smoothing=0.25, weights=weights)
    exact = float(torch.tensor(margin, dtype=dtype))
    total = exact + math.log(4)
    expected = max(total, 0.0) - 0.25 * (exact + math.log(2))
    torch.testing.assert_close(loss.detach(), torch.full((2,), expected), rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    for tensor in (*given, weights):
        assert tensor.grad.isfinite().all()
    for tensor in (*values, weights):
        assert (tensor.grad[~mask] == 0).all()
    hard = 1.0 if margin > 0 else 0.0
    share = torch.full((2, 2), hard / 2 - 0.25 / 2)
    torch.testing.assert_close(values[0].grad[:, [3, 70]].float(), share, atol=1e-3, rtol=0)


@pytest.mark.parametrize("margin", [19.0, 21.0, 30.0])
def test_float64_is_exact_where_torch_rounds_softplus_to_its_argument(margin):
    zero, rejected = torch.zeros(1).double(), torch.full((1, 1), margin).double()
    found = float(softmax_dpo_loss(zero, rejected, None, None, 1.0))
    assert found - margin == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-14)


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


def cross_entropy(margins: np.ndarray, weights: np.ndarray, smoothing: float) -> float:
    """Of the softmax over the chosen answer's logit 0 and ``margins + log(weights)``, as the definition has it."""
    logits = np.concatenate([[0.0], margins + np.log(weights)])
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    target = np.concatenate([[1 - smoothing], np.full(len(margins), smoothing / len(margins))])
    return float(-(target * np.log(probabilities)).sum())


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    rows, negatives = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = generator.random((rows, negatives)) < 0.6
    mask[np.arange(rows), generator.integers(0, negatives, rows)] = True
    return {
        "values": [generator.normal(-20, 6, shape) for shape in ((rows,), (rows, negatives)) * 2],
        "mask": mask,
        "weights": generator.choice([0.25, 1.0, 3.0], (rows, negatives)),
        "beta": float(generator.uniform(0.05, 2)),
        "smoothing": float(generator.choice([0.0, 0.1, 0.49])),
    }


@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_it_is_the_cross_entropy_of_a_softmax(batch):
    chosen, rejected, reference_chosen, reference_rejected = batch["values"]
    margins = batch["beta"] * ((rejected - reference_rejected) - (chosen - reference_chosen)[:, None])
    expected = [
        cross_entropy(row[kept], weights[kept], batch["smoothing"])
        for row, kept, weights in zip(margins, batch["mask"], batch["weights"], strict=True)
    ]
    given = [torch.tensor(value) for value in batch["values"]]
    options = {"label_smoothing": batch["smoothing"], "weights": torch.tensor(batch["weights"])}
    found = softmax_dpo_loss(*given, batch["beta"], torch.tensor(batch["mask"]), **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_label_smoothing_with_one_negative_is_conservative_dpo():
    """(1 - e) of DPO's loss and e of the one with the answers swapped."""
    chosen, rejected, reference_chosen, reference_rejected = values = inputs(64, 1)
    difference = 0.2 * ((chosen - rejected[:, 0]) - (reference_chosen - reference_rejected[:, 0]))
    for smoothing in (0.1, 0.4):
        expected = -(1 - smoothing) * logsigmoid(difference) - smoothing * logsigmoid(-difference)
        found = softmax_dpo_loss(*values, 0.2, label_smoothing=smoothing)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_a_whole_weight_counts_an_answer_so_many_times_and_zero_leaves_it_out():
    chosen, rejected, reference_chosen, reference_rejected = inputs(4, 3)
    weights = torch.tensor([[2.0, 0.0, 1.0]]).repeat(4, 1).double()
    found = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.3, weights=weights)
    repeated = [tensor[:, [0, 0, 2]] for tensor in (rejected, reference_rejected)]
    torch.testing.assert_close(
        found, softmax_dpo_loss(chosen, repeated[0], reference_chosen, repeated[1], 0.3), atol=1e-12, rtol=1e-12
    )
    # Smoothing goes to the two answers that are left.
    smoothed = softmax_dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected, 0.3, label_smoothing=0.1, weights=weights
    )
    margins = 0.3 * ((rejected - reference_rejected) - (chosen - reference_chosen)[:, None])
    torch.testing.assert_close(found - smoothed, 0.1 * (margins[:, 0] + math.log(2) + margins[:, 2]) / 2)


def test_weights_estimate_the_loss_against_uniform_draws():
    """Of four answers, draws with q = (1/2, 1/4, 1/8, 1/8) and weights 1 / (4 q): their mean is that of uniform draws.

    With one draw the loss is softplus(m + log w), so exp of it, less 1, is linear in the sum that is estimated.
    """
    chosen, rejected, reference_chosen, reference_rejected = inputs(1, 4)
    draws = torch.tensor([0.5, 0.25, 0.125, 0.125]).double()
    mean = 0.0
    for place, probability in enumerate(draws):
        one, reference = (tensor[:, place : place + 1] for tensor in (rejected, reference_rejected))
        weight = (1 / (4 * probability)).reshape(1, 1)
        loss = softmax_dpo_loss(chosen, one, reference_chosen, reference, 0.2, weights=weight)
        mean += float(probability * torch.expm1(loss))
    every = softmax_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.2)
    assert mean == pytest.approx(float(torch.expm1(every)) / 4, rel=1e-9)


def test_without_a_reference_it_is_that_of_a_reference_of_zeros():
    chosen, rejected, *_ = inputs(5, 3)
    found = softmax_dpo_loss(chosen, rejected, None, None, 0.3)
    zeros = (torch.zeros_like(chosen), torch.zeros_like(rejected))
    torch.testing.assert_close(found, softmax_dpo_loss(chosen, rejected, *zeros, 0.3), atol=0, rtol=0)
    for reference in ((zeros[0], None), (None, zeros[1])):
        with pytest.raises(UserError, match="only one of reference_chosen and reference_rejected is given: give both"):
            softmax_dpo_loss(chosen, rejected, *reference, 0.3)


def test_a_device_is_not_waited_for():
    """Tensors of the meta device have no values: to look at one is an error."""
    values = [value.to("meta") for value in inputs(2, 3)]
    mask, weights = torch.ones(2, 3, dtype=torch.bool, device="meta"), torch.ones(2, 3, device="meta")
    assert softmax_dpo_loss(*values, 1.0, mask, label_smoothing=0.1, weights=weights).shape == (2,)


def test_a_row_without_a_negative_that_nobody_looks_for_is_still(monkeypatch):
    """As on a device that is not waited for: its loss and gradients are 0, and the other row's its own."""
    mask = torch.tensor([[True, True], [False, False]])
    values = [value.requires_grad_() for value in inputs(2, 2)]
    expected = softmax_dpo_loss(values[0][:1], values[1][:1], values[2][:1], values[3][:1], 1.0)
    monkeypatch.setattr(loss_module, "_existing", lambda *_: mask)
    loss = softmax_dpo_loss(*values, 1.0, label_smoothing=0.1)
    plain = softmax_dpo_loss(*values, 1.0)
    torch.testing.assert_close(plain, torch.cat([expected, torch.zeros(1).double()]))
    assert loss[1] == 0
    for gradient in torch.autograd.grad(loss.sum(), values):
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).all()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_out_of_range_is_named_unless_it_is_masked(weight):
    weights = torch.tensor([[1.0, 1.0], [1.0, weight]])
    with pytest.raises(UserError, match=f"weight {weight} of row 2 of the batch is not possible: weights are finite"):
        softmax_dpo_loss(*inputs(2, 2), 1.0, weights=weights)
    mask = torch.tensor([[True, True], [True, False]])
    assert softmax_dpo_loss(*inputs(2, 2), 1.0, mask, weights=weights).isfinite().all()


@pytest.mark.parametrize("smoothing", [0.5, -0.1, math.nan])
def test_label_smoothing_is_below_one_half(smoothing):
    with pytest.raises(UserError, match=f"label_smoothing {smoothing} is not possible: it must be from 0 to below 0.5"):
        softmax_dpo_loss(*inputs(), 1.0, label_smoothing=smoothing)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_above_zero(beta):
    with pytest.raises(UserError, match=f"beta {beta} is not possible: it must be above 0"):
        softmax_dpo_loss(*inputs(), beta)


def test_every_row_needs_a_negative():
    with pytest.raises(UserError, match="row 1 of the batch has no rejected answer: softmax-DPO needs at least one"):
        softmax_dpo_loss(*inputs(2, 0), 1.0)
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(UserError, match="row 2 of the batch has no rejected answer"):
        softmax_dpo_loss(*inputs(3, 2), 1.0, mask)
    with pytest.raises(UserError, match="row 3 of the batch has no rejected answer"):
        softmax_dpo_loss(*inputs(3, 2), 1.0, weights=torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))
