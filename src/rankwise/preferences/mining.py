"""Hard negatives: the wrong answers of a catalogue that the model itself finds most likely after a prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.likelihood import evaluating
from rankwise.tokenise import answer_ids
from rankwise.trees.build import token_tree
from rankwise.trees.catalogue import catalogue_scores, separate_log_probabilities
from rankwise.trees.scoring import answer_log_probabilities_of
from rankwise.trees.support import why_no_trees
from rankwise.trees.trie import CatalogueTrie


def answer_trie(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> CatalogueTrie:
    """The trie of a catalogue's answers, tokenised as those of rows: alone, and closed by the end-of-text token."""
    return CatalogueTrie(answer_ids(tokenizer, answers))


def mine_hard(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    excluded: Sequence[Collection[int]],
    count: int,
    *,
    padding: int,
    pools: Sequence[Sequence[int]] | None = None,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """The ``count`` wrong answers with the highest log-probability after each prompt, summed over tokens.

    Meanwhile the model is in evaluation mode and has no gradients; then each of its modules is in its own mode again.

    Args:
        model: a causal language model, adapted or not.
        prompts: token ids of each, one or more; with the longest answer of the trie they fit the model's positions.
        trie: the answers of the catalogue.
        excluded: for each prompt, indices of answers that are never mined: the right one, and what the user has seen.
        count: how many for each prompt, 1 or more; a prompt with fewer left gets those.
        padding: id that fills rows.
        pools: for each prompt, indices of the answers to rank, such as `Catalogue.draw` gives: one token tree of the
            prompt and these costs far less than the whole catalogue, which is ranked where they are not given.
        batch_tokens: most tokens of a batch.

    Returns:
        For each prompt, indices of answers, best first.

    Raises:
        UserError: nothing is left for a prompt, or count is below 1.
    """
    if count < 1:
        raise UserError(f"mining {count} answers for a prompt is not possible: 1 or more")
    if pools is None:
        _check_left([len(trie) - len(set(barred)) for barred in excluded])
        scored = _whole(model, prompts, trie, excluded, padding, batch_tokens)
    else:
        pairs = zip(pools, excluded, strict=True)
        wrong = [[index for index in dict.fromkeys(pool) if index not in barred] for pool, barred in pairs]
        _check_left([len(indices) for indices in wrong])
        scored = _pooled(model, prompts, trie, wrong, padding, batch_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for row, indices, scores in scored:
            best = scores.topk(min(count, len(scores))).indices.cpu()
            found[row] = indices[best].tolist()
    return found


def _check_left(left: Sequence[int]) -> None:
    if 0 in left:
        number = left.index(0) + 1
        raise UserError(f"prompt {number} of {len(left)} has no wrong answer left to mine: leave its row out")


Scored = Iterator[tuple[int, Int[Tensor, " answers"], Float[Tensor, " answers"]]]


def _whole(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    excluded: Sequence[Collection[int]],
    padding: int,
    batch_tokens: int,
) -> Scored:
    """Each prompt's place, the indices of all its wrong answers, and their log-probabilities."""
    for rows, scores in catalogue_scores(model, prompts, trie, padding, batch_tokens):
        for row, values in zip(rows, scores, strict=True):
            wrong = torch.ones(len(trie), dtype=torch.bool)
            wrong[list(excluded[row])] = False
            yield row, wrong.nonzero()[:, 0], values[wrong.to(values.device)]


def _pooled(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    wrong: Sequence[Sequence[int]],
    padding: int,
    batch_tokens: int,
) -> Scored:
    """The same of some wrong answers for each prompt."""
    answers = [[trie.answers[index] for index in indices] for indices in wrong]
    trees = [token_tree(prompt, texts) for prompt, texts in zip(prompts, answers, strict=True)]
    if why_no_trees(model, max(tree.longest for tree in trees)):
        pairs = zip(prompts, answers, strict=True)
        totals = [separate_log_probabilities(model, prompt, texts, batch_tokens).tolist() for prompt, texts in pairs]
    else:
        totals = answer_log_probabilities_of(model, trees, padding, batch_tokens)
    for row, (indices, values) in enumerate(zip(wrong, totals, strict=True)):
        yield row, torch.tensor(indices), torch.tensor(values)
