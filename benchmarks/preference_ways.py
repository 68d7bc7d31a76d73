"""One training step of softmax-DPO in several ways: what bench_preferences.py measures.

The published way is stated anew from its description: each answer after its own copy of the prompt, logits of all
positions in float32, their whole log_softmax, the loss as ``-log sigmoid(-log sum exp)``, the reference at each step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import peft
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.models import quiet_libraries
from rankwise.preferences.batches import BatchMaker, SequenceBatch, answer_totals
from rankwise.preferences.loss import softmax_dpo_loss
from rankwise.preferences.reference import BaseReference
from rankwise.preferences.rows import PreferenceRow
from rankwise.trees import TreeBatch
from timing import peak_memory

BETA = 1.0
PUBLISHED = "published"


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int

    def base(self, device: str, dtype: str) -> LlamaForCausalLM:
        """With random weights, the head tied to the embedding; the same at every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
        return LlamaForCausalLM(config).to(device, getattr(torch, dtype))

    def head_share(self, model: nn.Module) -> float:
        """Of all weights."""
        return self.hidden * self.vocabulary / sum(value.numel() for value in model.parameters())


SHAPES = {
    "15m": Shape(288, 6, 6, 768, 32000),  # of the llama2.c stories
    "7m": Shape(288, 6, 6, 768, 4096),  # the same with the vocabulary of the model that ships with rankwise
    "wide": Shape(1024, 3, 16, 2816, 8192),
    "1b": Shape(2048, 16, 32, 8192, 32000),
    "tiny": Shape(32, 1, 2, 64, 4096),  # says nothing; for a trial
}


@dataclass(frozen=True)
class Case:
    """What is trained on, and where."""

    shape: str
    rows: int
    negatives: int
    prompt: int
    device: str
    dtype: str
    threads: int

    def data(self) -> list[PreferenceRow]:
        """Rows of random tokens: a prompt, and answers of 5 to 12 tokens that share hardly anything."""
        generator = random.Random(0)
        vocabulary = SHAPES[self.shape].vocabulary

        def tokens(count: int) -> list[int]:
            return [generator.randrange(2, vocabulary) for _ in range(count)]

        return [
            PreferenceRow(tokens(self.prompt), [tokens(generator.randint(5, 12)) for _ in range(1 + self.negatives)])
            for _ in range(self.rows)
        ]


@dataclass(frozen=True)
class Way:
    """How a step is computed: as published, or as rankwise does."""

    published: bool = False
    trees: bool = True
    reference_known: bool = False
    attention: str = "sdpa"

    def tokens(self, rows: Sequence[PreferenceRow]) -> int:
        """Places of the batch that goes through the model, padding included."""
        return (padded(rows)[0] if self.published else self.batch(rows).input_ids).numel()

    def batch(self, rows: Sequence[PreferenceRow]) -> TreeBatch | SequenceBatch:
        return BatchMaker(0, trees=self.trees)(rows)


WAYS = {
    PUBLISHED: Way(published=True),
    "separate": Way(trees=False),
    "tree": Way(),
    "tree, reference known": Way(reference_known=True),
}
ON_A_GPU = {
    "tree, FlexAttention": Way(attention="flex_attention"),
    "tree, reference known, FlexAttention": Way(reference_known=True, attention="flex_attention"),
}


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


class Steps:
    """A model with an adapter that is not at its start, and steps of its training in any way."""

    def __init__(self, case: Case) -> None:
        self.device, self.rows = case.device, case.data()
        base = SHAPES[case.shape].base(case.device, case.dtype)
        self.head_share = SHAPES[case.shape].head_share(base)
        self.model = peft.get_peft_model(base, lora(init_lora_weights=False)).train()
        self.reference = BaseReference(self.model)
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)  # so that all ways go on with the same weights

    def ready(self, way: Way) -> Callable[[], Tensor]:
        """One whole step of training, which returns its loss; it was taken before on rows of hardly any tokens."""
        row = self.rows[0]
        self.step(way, [PreferenceRow(row.prompt[:8], [answer[:2] for answer in row.answers[:2]])])
        self.optimizer.zero_grad()
        known = self.reference_totals(way.batch(self.rows)) if way.reference_known else None
        return lambda: self.step(way, self.rows, known)

    def step(self, way: Way, rows: Sequence[PreferenceRow], known: Tensor | None = None) -> Tensor:
        self.optimizer.zero_grad()
        self.model.get_base_model().set_attn_implementation(way.attention)
        loss = published_loss(self.model, rows) if way.published else self.loss(way, rows, known)
        loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    def loss(self, way: Way, rows: Sequence[PreferenceRow], known: Tensor | None) -> Tensor:
        """Ours, as SoftmaxDPOTrainer computes it."""
        batch = way.batch(rows).to(self.device)
        reference = self.reference_totals(batch) if known is None else known
        policy = answer_totals(self.model, batch)
        parts = (policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:])
        return softmax_dpo_loss(*parts, BETA, batch.exists[:, 1:]).mean()

    def reference_totals(self, batch: TreeBatch | SequenceBatch) -> Tensor:
        with self.reference.active() as model:
            return answer_totals(model, batch.to(self.device))


def padded(rows: Sequence[PreferenceRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which of them are real, and which an answer's; padded on the right."""
    pairs = [(row.prompt, answer) for row in rows for answer in row.answers]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.tensor([prompt + answer + [0] * (length - len(prompt) - len(answer)) for prompt, answer in pairs])
    places = torch.arange(length)
    ends = torch.tensor([len(prompt) + len(answer) for prompt, answer in pairs])[:, None]
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    return ids, (places < ends).long(), (places >= starts) & (places < ends)


def published_totals(model: nn.Module, rows: Sequence[PreferenceRow]) -> Tensor:
    """Summed log-probabilities of the answers, (batch, answers); each row has equally many."""
    device = next(model.parameters()).device
    ids, real, answers = (tensor.to(device) for tensor in padded(rows))
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits.float()
    every = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return (every * answers[:, 1:]).sum(dim=1).view(len(rows), -1)


def published_loss(model: nn.Module, rows: Sequence[PreferenceRow]) -> Tensor:
    policy = published_totals(model, rows)
    with torch.no_grad(), model.disable_adapter():
        reference = published_totals(model, rows)
    ratios = policy - reference
    margins = BETA * (ratios[:, 1:] - ratios[:, :1])
    return -nn.functional.logsigmoid(-margins.exp().sum(dim=1).log()).mean()


@dataclass(frozen=True)
class First:
    """A model's first step.

    Attributes:
        loss: its value.
        gradient: of all that is trained.
        memory: mebibytes that it added to what was there before.
    """

    loss: float
    gradient: NDArray[np.float64]
    memory: float


def first_step(case: Case, way: Way) -> First:
    """For a process of its own."""
    quiet_libraries()
    torch.set_num_threads(case.threads)
    steps = Steps(case)
    take = steps.ready(way)
    before = resident(case.device)
    loss = take()
    memory = (peak_memory() if case.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20) - before
    gradients = [value.grad.double().flatten().cpu() for value in steps.trained if value.grad is not None]
    return First(float(loss), torch.cat(gradients).numpy(), memory)


def resident(device: str) -> float:
    """Mebibytes in use now; of a GPU, the peak is counted from here."""
    if device == "cpu":
        return psutil.Process().memory_info().rss / 2**20
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20
