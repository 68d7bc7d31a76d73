"""Hard negatives: the wrong answers of a catalogue that the model itself finds most likely after a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.tokenise import answer_ids
from rankwise.trees.build import token_tree
from rankwise.trees.catalogue import CatalogueTrie, catalogue_scores, separate_log_probabilities
from rankwise.trees.scoring import answer_log_probabilities_of
from rankwise.trees.support import why_no_trees


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
    skip: int = 0,
    per_token: bool = False,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """The ``count`` wrong answers with the highest log-probability after each prompt.

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
        skip: leave out so many of the best wrong answers, which may well be right and only not observed (top-K shifted
            by N in arXiv 2407.15831); 0 or more.
        per_token: rank by the mean log-probability of an answer's tokens, not by the sum. The sum is that of the answer
            as a whole, by which an evaluation ranks too; it favours short answers.
        batch_tokens: most tokens of a batch.

    Returns:
        For each prompt, indices of answers, best first.

    Raises:
        UserError: nothing is left for a prompt, or count or skip is out of its range.
    """
    if count < 1 or skip < 0:
        raise UserError(
            f"mining {count} answers beyond the best {skip} is not possible: count is 1 or more, skip 0 or more"
        )
    if pools is None:
        _check_left([len(trie) - len(set(barred)) for barred in excluded], skip)
        scored = _whole(model, prompts, trie, excluded, padding, batch_tokens)
    else:
        pairs = zip(pools, excluded, strict=True)
        wrong = [[index for index in dict.fromkeys(pool) if index not in barred] for pool, barred in pairs]
        _check_left([len(indices) for indices in wrong], skip)
        scored = _pooled(model, prompts, trie, wrong, padding, batch_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model):
        for row, indices, scores in scored:
            ranked = scores / trie.lengths[indices].to(scores) if per_token else scores
            best = ranked.topk(min(skip + count, len(ranked))).indices[skip:].cpu()
            found[row] = indices[best].tolist()
    return found


def _check_left(left: Sequence[int], skip: int) -> None:
    for number, wrong in enumerate(left, start=1):
        if wrong <= skip:
            raise UserError(
                f"prompt {number} of {len(left)} has no hard negative: {wrong} wrong answers are left and skip is"
                f" {skip}; leave the row out, or skip fewer"
            )


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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; then every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
