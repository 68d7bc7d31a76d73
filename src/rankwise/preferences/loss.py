"""The softmax-DPO loss: one chosen answer against any number of rejected ones."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from rankwise.errors import UserError


def softmax_dpo_loss(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, "batch negatives"],
    reference_chosen: Float[Tensor, " batch"],
    reference_rejected: Float[Tensor, "batch negatives"],
    beta: float,
    mask: Bool[Tensor, "batch negatives"] | None = None,
) -> Float[Tensor, " batch"]:
    """Compute ``softplus(logsumexp_j(beta * ((r_j - ref_j) - (c - ref_c))))`` for each row.

    This is ``-log sigmoid(-log sum_j exp(margin_j))`` of the paper without its overflow: finite, with finite
    gradients, for any finite margin. With one negative it is the sigmoid loss of DPO.

    Args:
        policy_chosen: log-probabilities c of the chosen answers under the policy, in nats, summed over tokens.
        policy_rejected: the same, r_j, of the rejected answers.
        reference_chosen: ref_c, under the reference.
        reference_rejected: ref_j, under the reference.
        beta: strength of the tie to the reference, above 0; the paper uses 1.
        mask: true where a rejected answer exists; at least one in each row. All exist where it is not given.

    Returns:
        The loss of each row, float32 at least, differentiable.

    Raises:
        UserError: beta is not above 0, or there is no negative.

    Source: Softmax-DPO (arXiv 2406.09215), equation 11.
    """
    if not beta > 0:
        raise UserError(f"beta {beta} is not possible: it must be above 0")
    if policy_rejected.shape[1] == 0 or (mask is not None and not mask.any(dim=1).all()):
        raise UserError("a row has no rejected answer: softmax-DPO needs at least one in each row")
    dtype = torch.promote_types(policy_chosen.dtype, torch.float32)
    chosen = policy_chosen.to(dtype) - reference_chosen.to(dtype)
    rejected = policy_rejected.to(dtype) - reference_rejected.to(dtype)
    margins = beta * (rejected - chosen[:, None])
    if mask is not None:
        margins = margins.masked_fill(~mask, -torch.inf)
    return softplus(torch.logsumexp(margins, dim=1))
