"""Log-probabilities of the answers of token trees under a causal language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankwise.likelihood import target_log_probabilities, tokens_for_logits, unwrapped
from rankwise.trees.batch import TreeBatch, batch_trees, rounded_up
from rankwise.trees.build import TokenTree
from rankwise.trees.masks import attention_mask_for


def tree_log_probabilities(model: nn.Module, batch: TreeBatch) -> Float[Tensor, "trees answers"]:
    """Summed log-probability of every answer's tokens, in nats, float32 at least; 0 where a tree has no such answer.

    One forward pass over the packed rows; the output head runs only where a token of an answer is predicted. Values and
    gradients equal those of separate sequences up to rounding.

    Args:
        model: a causal language model that `why_no_trees` has nothing against, adapted or not.
        batch: trees, on the model's device.
    """
    mask = attention_mask_for(model, batch.ends)
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}
    with head_reads(model, batch.reads):
        logits = model(**inputs, use_cache=False).logits[0]
    edges = target_log_probabilities(logits, batch.edge_reads, batch.edge_tokens)
    return nn.functional.pad(edges, (0, 1))[batch.paths].sum(dim=2)


@contextlib.contextmanager
def head_reads(model: nn.Module, places: Int[Tensor, " reads"]) -> Iterator[None]:
    """Within it the output head gets (1, reads, hidden): only these places of the flattened rows."""

    def pick(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0].flatten(0, 1)[places][None],)

    handle = unwrapped(model).get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def answer_log_probabilities_of(
    model: nn.Module, trees: Sequence[TokenTree], padding: int, batch_tokens: int = 16384
) -> list[list[float]]:
    """The same for any number of trees, without gradients, in batches of trees of similar size.

    Args:
        model: as above; in evaluation mode.
        trees: in any order.
        padding: id that fills rows.
        batch_tokens: most tokens of a batch, the filling included, unless a single tree has more; fewer where the
            vocabulary is so wide that logits fill the memory.

    Returns:
        Of each tree, the log-probability of each answer, in nats.
    """
    device = next(model.parameters()).device
    found: list[list[float]] = [[] for _ in trees]
    widths, reads = [rounded_up(len(tree)) for tree in trees], [len(set(tree.sources)) for tree in trees]
    for picked in _batches(widths, batch_tokens, reads, tokens_for_logits(model, batch_tokens)):
        batch = batch_trees([trees[index] for index in picked], padding).to(device)
        totals = tree_log_probabilities(model, batch).tolist()
        for index, values in zip(picked, totals, strict=True):
            found[index] = values[: len(trees[index].paths)]
    return found


def _batches(widths: Sequence[int], most: int, reads: Sequence[int], most_reads: int) -> Iterator[list[int]]:
    """Places of trees with few enough tokens and logits; longest first, so that what does not fit shows at once."""
    batch: list[int] = []
    for index in sorted(range(len(widths)), key=widths.__getitem__, reverse=True):
        logits = sum(reads[place] for place in batch) + reads[index]
        if batch and ((len(batch) + 1) * widths[batch[0]] > most or logits > most_reads):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
