"""The softmax-DPO loss: one chosen answer against any number of rejected ones."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rankwise.errors import UserError


def softmax_dpo_loss(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, "batch negatives"],
    reference_chosen: Float[Tensor, " batch"] | None,
    reference_rejected: Float[Tensor, "batch negatives"] | None,
    beta: float,
    mask: Bool[Tensor, "batch negatives"] | None = None,
    *,
    label_smoothing: float = 0.0,
    weights: Float[Tensor, "batch negatives"] | None = None,
) -> Float[Tensor, " batch"]:
    """Compute ``softplus(logsumexp_j(m_j))``, ``m_j = beta * ((r_j - ref_j) - (c - ref_c))``, for each row.

    This is ``-log sigmoid(-log sum_j exp(m_j))`` of the paper without its overflow: finite, with finite gradients, for
    any finite margin. With one negative it is the sigmoid loss of DPO. It is the cross-entropy of a softmax over the
    logits 0, of the chosen answer, and m_j, of the rejected ones, whose target is the chosen answer; the two options
    change the target and the logits.

    Args:
        policy_chosen: log-probabilities c of the chosen answers under the policy, in nats, summed over tokens.
        policy_rejected: the same, r_j, of the rejected answers.
        reference_chosen: ref_c, under the reference. None, together with ``reference_rejected``, for no reference: the
            log-ratios are then the policy's log-probabilities.
        reference_rejected: ref_j, under the reference.
        beta: strength of the tie to the reference, above 0; the paper uses 1.
        mask: true where a rejected answer exists; at least one in each row. All exist where it is not given. What the
            other tensors hold where it is false changes nothing, infinities and NaN included.
        label_smoothing: part e of the target that goes to the row's K rejected answers, e / K to each, from 0 to below
            0.5: the loss becomes ``softplus(logsumexp_j(m_j)) - e / K * sum_j m_j``. With one negative it is the
            conservative DPO for labels that are wrong with probability e, ``(1 - e) softplus(m) + e softplus(-m)``.
        weights: w_j of each rejected answer, finite, 0 or above: it counts w_j times, that is, m_j becomes
            ``m_j + log(w_j)``. An answer of weight 0 is left out, as one that is masked. For negatives drawn with
            probabilities q_j, weights in proportion to 1 / q_j estimate the sum over uniform draws (the logQ correction
            of sampled softmax); weights that grow with an answer's score, with mean 1 in a row, stress hard negatives.

    Returns:
        The loss of each row, float32 at least, differentiable.

    Raises:
        UserError: beta or label_smoothing is out of its range, one of the references is missing, there is no negative,
            or, for tensors on the CPU, a row has none or a weight is out of its range. To look at the values of a mask
            or of weights on another device would wait for it at each step: there a row without negatives has loss and
            gradients of 0, and a bad weight makes the loss NaN or infinite.

    Source: Softmax-DPO (arXiv 2406.09215), equation 11. Label smoothing: Szegedy et al. 2015 (arXiv 1512.00567); for
        pairs, Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO". Weights: Bengio and
        Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic language model",
        for the draws; Robinson et al. 2021 (arXiv 2010.04592) for hardness.
    """
    _check_settings(beta, label_smoothing, (reference_chosen is None) != (reference_rejected is None))
    exists = _existing(policy_rejected, mask, weights)
    dtype = torch.promote_types(policy_chosen.dtype, torch.float32)
    chosen, rejected = policy_chosen.to(dtype), policy_rejected.to(dtype)
    if reference_chosen is not None and reference_rejected is not None:
        chosen, rejected = chosen - reference_chosen.to(dtype), rejected - reference_rejected.to(dtype)
    margins = beta * (rejected - chosen[:, None])
    if weights is not None:
        # Replaced before the logarithm, whose derivative at 0 or NaN times a gradient of 0 would be NaN.
        margins = margins + torch.where(exists, weights, 1).to(dtype).log()
    loss = -logsigmoid(-torch.where(exists, margins, -torch.inf).logsumexp(dim=1))
    if label_smoothing:
        loss = loss - label_smoothing * torch.where(exists, margins, 0).sum(dim=1) / exists.sum(dim=1).clamp(min=1)
    return loss


def _check_settings(beta: float, label_smoothing: float, one_reference: bool) -> None:
    if not beta > 0:
        raise UserError(f"beta {beta} is not possible: it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing {label_smoothing} is not possible: it must be from 0 to below 0.5")
    if one_reference:
        raise UserError("only one of reference_chosen and reference_rejected is given: give both, or None for both")


def _existing(rejected: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """Which rejected answers count: those that exist and have a weight."""
    exists = torch.ones_like(rejected, dtype=torch.bool) if mask is None else mask
    if weights is not None and weights.device.type == "cpu":
        _check_weights(weights, exists)
    if weights is not None:
        exists = exists & (weights != 0)
    if exists.shape[1] == 0 or (exists.device.type == "cpu" and not exists.any(dim=1).all()):
        row = 1 if exists.shape[1] == 0 else 1 + int(exists.any(dim=1).int().argmin())
        raise UserError(f"row {row} of the batch has no rejected answer: softmax-DPO needs at least one in each row")
    return exists


def _check_weights(weights: Tensor, exists: Tensor) -> None:
    bad = (exists & ~((weights >= 0) & weights.isfinite())).nonzero()
    if len(bad):
        row, negative = bad[0].tolist()
        raise UserError(
            f"weight {float(weights[row, negative])} of row {row + 1} of the batch is not possible:"
            " weights are finite and 0 or above"
        )
