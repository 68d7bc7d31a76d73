"""Three small networks that read the latest titles of a history: recurrent, convolutional, with attention.

Each takes rows of titles (numbers from 1, oldest first, 0 filling on the left) and gives a vector for each row. The
score of a title is the product of that vector and the title's embedding. They have no embedding of the user, so that
they serve histories of users that were not there in training.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Rows = Int[Tensor, "rows length"]
Vectors = Float[Tensor, "rows width"]


class NextTitle(nn.Module):
    """Embeddings of titles, and scores of all titles after each row."""

    def __init__(self, titles: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(titles + 1, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight[1:], std=width**-0.5)

    def read(self, rows: Rows) -> Vectors:
        """A vector for each row."""
        raise NotImplementedError

    def forward(self, rows: Rows) -> Float[Tensor, "rows titles"]:
        """Scores of all titles, the logits of a softmax over them."""
        return self.read(rows) @ self.embedding.weight[1:].T


class GRU4Rec(NextTitle):
    """A gated recurrent unit over the history; its last state.

    Source: Hidasi et al., Session-based recommendations with recurrent neural networks (arXiv 1511.06939), with a
    softmax over all titles in place of its ranking losses.
    """

    def __init__(self, titles: int, length: int, width: int = 64, dropout: float = 0.2) -> None:
        super().__init__(titles, width)
        self.dropout = nn.Dropout(dropout)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.last = nn.Linear(width, width)

    def read(self, rows: Rows) -> Vectors:
        """The state after the latest title; filling is never read."""
        lengths = (rows > 0).sum(dim=1).clamp(min=1)
        # The filling goes to the right: what is packed has to begin with each row's own titles.
        order = (torch.arange(rows.shape[1], device=rows.device) - lengths[:, None]) % rows.shape[1]
        states = self.dropout(self.embedding(rows.gather(1, order)))
        packed = nn.utils.rnn.pack_padded_sequence(states, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.recurrent(packed)
        found: Tensor = self.last(last[0])
        return found


class Caser(NextTitle):
    """Convolutions over the latest titles as an image: across all of their values, and along each of them.

    Source: Tang and Wang, Personalized top-N sequential recommendation via convolutional sequence embedding
    (arXiv 1809.07426).
    """

    def __init__(self, titles: int, length: int, width: int = 64, dropout: float = 0.2) -> None:
        super().__init__(titles, width)
        self.across = nn.ModuleList([nn.Conv2d(1, 16, (height, width)) for height in range(1, length + 1)])
        self.along = nn.Conv2d(1, 4, (length, 1))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16 * length + 4 * width, width)

    def read(self, rows: Rows) -> Vectors:
        """Convolutions, their largest values, and a layer over all of them."""
        image = self.embedding(rows)[:, None]
        across = [nn.functional.relu(layer(image))[..., 0].amax(dim=2) for layer in self.across]
        found: Tensor = self.last(self.dropout(torch.cat([self.along(image).flatten(1), *across], dim=1)))
        return found


class SASRec(NextTitle):
    """Self-attention in which a title sees those before it; the state at the latest one.

    Source: Kang and McAuley, Self-attentive sequential recommendation (arXiv 1808.09781), with a softmax over all
    titles in place of sampled ones.
    """

    def __init__(self, titles: int, length: int, width: int = 64, dropout: float = 0.2, heads: int = 2) -> None:
        super().__init__(titles, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.positions.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def read(self, rows: Rows) -> Vectors:
        """The state at the latest title."""
        return self.states(rows)[:, -1]

    def states(self, rows: Rows) -> Float[Tensor, "rows length width"]:
        """The state at each title, which later ones do not change."""
        length = rows.shape[1]
        hidden = self.dropout(
            self.embedding(rows) * self.embedding.embedding_dim**0.5 + self.positions.weight[-length:]
        )
        found: Tensor = self.blocks(hidden, mask=_hidden(rows, self.blocks.layers[0].self_attn.num_heads))
        return found


def _hidden(rows: Rows, heads: int) -> Bool[Tensor, "pairs length length"]:
    """What each place does not see: what comes later, and the filling; the filling sees itself."""
    length = rows.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=rows.device)
    hidden = (later | (rows == 0)[:, None]) & ~itself
    return hidden.repeat_interleave(heads, dim=0)
