"""What a batch of preferences says about the policy: rewards, margins, and the rank of the chosen answer.

Every measure has one value a row. Its mean over all rows, of several batches or processes, is the measure.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RANK_CUTOFF = 5  # of NDCG


def preference_measures(
    policy: Float[Tensor, "batch answers"],
    reference: Float[Tensor, "batch answers"],
    exists: Bool[Tensor, "batch answers"],
    beta: float,
    weights: Float[Tensor, "batch negatives"] | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """Rewards ``beta * (policy - reference)`` of the answers of each row, and what follows from them.

    - ``rewards/chosen``, ``logps/chosen``: of the chosen answer.
    - ``rewards/rejected``, ``logps/rejected``: the mean over the row's rejected answers.
    - ``rewards/margins``: the first minus the second.
    - ``rewards/accuracies``: 1 where the chosen answer's reward is above every rejected one's, else 0.
    - ``negatives/effective``: exp of the entropy of the shares that the rejected answers have in the loss's gradient,
      ``softmax_j(reward_j + log(w_j))``: from 1 (one hard negative has all) to their number (all have the same).

    With one rejected answer a row the means are those that TRL's DPO trainer logs.

    Args:
        policy: log-probabilities of the chosen answer, then of the rejected ones, in nats, summed over tokens.
        reference: the same under the reference; zeros where there is none.
        exists: which answers a row has: the chosen one and at least one other.
        beta: of the loss.
        weights: w_j of the rejected answers, as the loss got them; 1 each where not given.

    Returns:
        For each measure one value a row, without a gradient.

    Source: Softmax-DPO (arXiv 2406.09215), which finds these shares, without weights, in the gradient of its loss.
    """
    policy = policy.detach().to(torch.promote_types(policy.dtype, torch.float32))
    rewards = beta * (policy - reference)
    rejected, there = rewards[:, 1:], exists[:, 1:]
    hard = torch.where(there, rejected, -torch.inf)
    mean_rejected = _mean(rejected, there)
    shares = (hard if weights is None else hard + torch.where(there, weights.detach(), 1).log()).softmax(dim=1)
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": mean_rejected,
        "rewards/margins": rewards[:, 0] - mean_rejected,
        "rewards/accuracies": (rewards[:, 0] > hard.amax(dim=1)).to(rewards.dtype),
        "logps/chosen": policy[:, 0],
        "logps/rejected": _mean(policy[:, 1:], there),
        "negatives/effective": torch.special.entr(shares).sum(dim=1).exp(),
    }


def ranking_measures(
    policy: Float[Tensor, "batch answers"], exists: Bool[Tensor, "batch answers"]
) -> dict[str, Float[Tensor, " batch"]]:
    """``ranking/HR@1``, ``ranking/MRR`` and ``ranking/NDCG@5`` of the chosen answer among all answers of its row.

    The rank is 1 for an answer more probable than every rejected one. A rejected answer that is as probable counts as
    better, and so does NaN: a policy that cannot tell answers apart earns nothing by it.

    Args:
        policy: log-probabilities of the chosen answer, then of the rejected ones, in nats, summed over tokens.
        exists: which answers a row has.

    Returns:
        For each measure one value a row, from 0 to 1, without a gradient.
    """
    scores = policy.detach().to(torch.promote_types(policy.dtype, torch.float32))
    worse = scores[:, 1:] < scores[:, :1]
    ranks = 1 + (exists[:, 1:] & ~worse).sum(dim=1).to(scores.dtype)
    gains = 1 / torch.log2(ranks + 1)
    return {
        "ranking/HR@1": (ranks == 1).to(scores.dtype),
        "ranking/MRR": 1 / ranks,
        f"ranking/NDCG@{RANK_CUTOFF}": torch.where(ranks <= RANK_CUTOFF, gains, 0),
    }


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean over the columns that are there."""
    return torch.where(there, values, 0).sum(dim=1) / there.sum(dim=1)
