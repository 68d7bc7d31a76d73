"""Generation that can only name what exists: whatever the strategy, what is written is an answer of a catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from rankwise.errors import UserError
from rankwise.trees.trie import CatalogueTrie


class CatalogueConstraint(LogitsProcessor):
    """Takes every token that leads out of the catalogue from what ``generate`` may write next.

    Greedy, sampled and beam search all work; probabilities are those of the model, renormalised over what is allowed.
    Give ``generate`` room for ``trie.longest`` new tokens, and ask for no more sequences than there are answers.

    Example:
        >>> constraint = CatalogueConstraint(trie, start=ids.shape[1], end=tokenizer.eos_token_id)  # doctest: +SKIP
        >>> model.generate(ids, logits_processor=[constraint], max_new_tokens=trie.longest)  # doctest: +SKIP

    Args:
        trie: the answers.
        start: tokens of a row before the answer, padding included.
        end: id that is written where an answer is whole: the token at which generation ends.

    Raises:
        UserError: ``start`` is negative; while writing, a row goes on with something that is no answer's beginning.
    """

    def __init__(self, trie: CatalogueTrie, start: int, end: int) -> None:
        if start < 0:
            raise UserError(f"start is {start}: give the tokens of a row before its answer, 0 or more")
        self.trie, self.start, self.end = trie, start, end
        pairs = zip(trie.source_list, trie.targets.tolist(), strict=True)
        self._edges = {pair: edge for edge, pair in enumerate(pairs)}

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Scores with -inf for what is not allowed."""
        allowed = torch.full_like(scores, -float("inf"))
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            allowed[row, self.allowed(ids)] = 0.0
        return scores + allowed

    def allowed(self, written: Sequence[int]) -> list[int]:
        """Ids that may follow what is written of an answer; only the end where it is whole and none goes on."""
        trie, node, whole = self.trie, 0, False
        for place, token in enumerate(written):
            edge = self._edges.get((node, token))
            if edge is None and whole and token == self.end:
                return [self.end]  # an answer that others go on from, which ended here
            if edge is None:
                raise UserError(
                    f"a row has {token} as token {place + 1} of its answer, with which no answer of the catalogue goes"
                    f" on there: start ({self.start}) has to be the tokens before the answer"
                )
            node, whole = trie.children[edge], edge in trie.answers_at
            if not node:
                return [self.end]
        following: list[int] = trie.targets[trie.starts[node] : trie.starts[node + 1]].tolist()
        return [*following, self.end] if whole else following
