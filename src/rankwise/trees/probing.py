"""Does a model score a tree as it scores separate sequences? Asked of the model itself, on one small tree."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from rankwise.likelihood import answer_log_probabilities, evaluating, unwrapped
from rankwise.trees.batch import batch_trees
from rankwise.trees.build import token_tree
from rankwise.trees.scoring import tree_log_probabilities

PROMPT, ANSWERS, STEPS = 8, 16, 6


def trees_are_exact(model: nn.Module, seed: int = 0) -> bool:
    """Whether a tree of random tokens gets the log-probabilities of separate sequences, up to the model's rounding.

    Rounding is told from a mistake by the size of one: of that made by seeing all earlier tokens of the row. The tree
    may be off by a share of it, in the median over the answers, of twice the square root of the model's machine
    epsilon: 0.0007 in float32, 0.18 in bfloat16. Or by a millionth of the log-probability: some new models do not see
    earlier tokens at all.

    Args:
        model: a causal language model, adapted or not; outside autocast. It is put in evaluation mode meanwhile.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(unwrapped(model).config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (PROMPT + ANSWERS * STEPS,), generator=generator)
    prompt, answers = tokens[:PROMPT].tolist(), tokens[PROMPT:].view(ANSWERS, STEPS).tolist()
    device = next(model.parameters()).device
    tree = batch_trees([token_tree(prompt, answers)], padding=0).to(device)
    plain = dataclasses.replace(tree, ends=torch.full_like(tree.ends, tree.ends.shape[1]))
    with evaluating(model), torch.no_grad():
        right = _separate(model, prompt, answers, device)
        mistake, error = ((tree_log_probabilities(model, one)[0] - right).abs().median() for one in (plain, tree))
    return bool(error <= torch.maximum(2 * _epsilon(model) ** 0.5 * mistake, 1e-6 * right.abs().median()))


def _separate(model: nn.Module, prompt: list[int], answers: list[list[int]], device: torch.device) -> Tensor:
    rows = torch.tensor([prompt + answer for answer in answers], device=device)
    labels = rows.clone()
    labels[:, : len(prompt)] = -100
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}
    return answer_log_probabilities(model, batch)[0].sum(dim=1)


def _epsilon(model: nn.Module) -> float:
    """Of the coarsest number that the model computes in, float32 at best; quantised weights count as bfloat16."""
    dtypes = {value.dtype if value.is_floating_point() else torch.bfloat16 for value in model.parameters()}
    return max(torch.finfo(dtype).eps for dtype in dtypes | {torch.float32})
