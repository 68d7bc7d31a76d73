"""The settings of preference training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import TrainingArguments

from rankwise.errors import UserError
from rankwise.preferences.negatives import Kind, stages_of_negatives
from rankwise.preferences.reference import SOURCES
from rankwise.schema.negatives import negatives_misfit

COLUMNS = {"given": "rejected", "candidates": "candidates"}  # that negatives of the rows themselves stand in
OWN = tuple(COLUMNS)


@dataclass
class SoftmaxDPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the settings of softmax-DPO.

    Args:
        beta: strength of the tie to the reference; above 0. The paper uses 1.
        max_length: most tokens of a prompt with an answer; longer prompts are cut on the left, and counted.
        reference: ``start`` (the model as it is when training begins: after supervised fine-tuning, as in the paper),
            ``base`` (the model with its adapter disabled) or ``none``.
        reference_adapter: name of another adapter of the model, in place of ``reference``.
        reference_cache: folder in which the reference's log-probabilities are kept between runs.
        label_smoothing: share of the target that goes to the rejected answers, from 0 to below 0.5.
        length_normalised: divide each log-probability by the answer's tokens (SimPO, arXiv 2405.14734).
        sft_weight: of the chosen answer's cross-entropy in nats a token, added to the loss (RPO, arXiv 2404.19733):
            against the fall of its likelihood. 0 or more.
        negatives: which rejected answers a row gets: ``given`` (its own, as they stand in ``rejected``), or drawn anew
            for each pass: ``candidates`` (from the row's own list of that name, as in the paper), ``uniform`` or
            ``popularity`` (from the trainer's catalogue), ``in-batch`` (the chosen answers of the batch's other rows)
            or ``hard`` (those of the catalogue that the model finds most likely). Never the chosen answer, and never
            one that stands in the row's ``seen``.
        num_negatives: how many of them; None for all of ``given`` and ``candidates``.
        negative_stages: numbers that grow in equal parts of the training, in place of ``num_negatives``.
        weigh_negatives: weigh each drawn answer by the inverse of its chance, so that draws by popularity count as even
            ones (the logQ correction of sampled softmax).
        hardness: weigh rejected answers in proportion to ``exp(hardness * margin)`` as well, with a mean of 1 in each
            row (arXiv 2010.04592); 0 for none. The paper's loss leans to hard ones by itself.
        mine_every: steps for whose rows ``hard`` answers are mined at once, with the model as it is then.
        mine_pool: how many answers of the catalogue, drawn evenly for each row, are ranked to mine; None for all.
        prefix_tree: compute what the answers of a row share once; exact, and off by itself where the model cannot.
        tokens_per_row: most tokens of a row of packed prefix trees, those of the longest tree at the least.

    Raises:
        UserError: a value out of its range.
    """

    beta: float = field(default=1.0, metadata={"help": "Strength of the tie to the reference, above 0."})
    max_length: int = field(default=1024, metadata={"help": "Most tokens of a prompt with an answer."})
    reference: Literal["start", "base", "none"] = field(default="start", metadata={"help": "start, base or none."})
    reference_adapter: str | None = field(default=None, metadata={"help": "Adapter that is the reference."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of the reference's values."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Target's share of the rejected, below 0.5."})
    length_normalised: bool = field(default=False, metadata={"help": "Log-probabilities per token of the answer."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen answer's cross-entropy."})
    negatives: Kind = field(default="given", metadata={"help": "Which rejected answers rows get."})
    num_negatives: int | None = field(default=None, metadata={"help": "How many of them."})
    negative_stages: list[int] | None = field(default=None, metadata={"help": "How many, growing in stages."})
    weigh_negatives: bool = field(default=False, metadata={"help": "Correct draws for their chances."})
    hardness: float = field(default=0.0, metadata={"help": "Weigh rejected answers by exp(hardness * margin)."})
    mine_every: int = field(default=1, metadata={"help": "Steps between two times of mining hard answers."})
    mine_pool: int | None = field(default=None, metadata={"help": "Answers that are ranked to mine; all if not given."})
    prefix_tree: bool = field(default=True, metadata={"help": "Compute what answers share once."})
    tokens_per_row: int | None = field(default=None, metadata={"help": "Most tokens of a row of packed trees."})

    def __post_init__(self) -> None:
        """Check the ranges; rows keep all their columns."""
        super().__post_init__()
        self.remove_unused_columns = False
        self._check("beta", 0 < self.beta < math.inf, "it must be above 0, and finite")
        self._check("max_length", self.max_length >= 2, "a prompt and an answer have at least one token each")
        self._check("reference", self.reference in SOURCES, f"{', '.join(SOURCES)} are possible")
        self._check("label_smoothing", 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5 is possible")
        self._check("sft_weight", self.sft_weight >= 0, "it must be 0 or above")
        self._check("negatives", self.negatives in get_args(Kind), f"{', '.join(get_args(Kind))} are possible")
        self._check_negatives()
        self._check("hardness", 0 <= self.hardness < math.inf, "it must be 0 or above, and finite")
        positive = self.tokens_per_row is None or self.tokens_per_row > 0
        self._check("tokens_per_row", positive, "it must be above 0, or None for the longest tree's")
        by_length = str(getattr(self, "train_sampling_strategy", "")) == "group_by_length"
        self._check("train_sampling_strategy", not by_length, "rows hold several answers: take random or sequential")
        unused = not self.label_smoothing_factor
        self._check("label_smoothing_factor", unused, "this loss has label_smoothing in its place")

    def _check_negatives(self) -> None:
        """Numbers of negatives, and settings that only some kinds of them have."""
        single = self.num_negatives is None or self.negative_stages is None
        self._check("negative_stages", single, "num_negatives is given too: leave one of them out")
        stages = self.stages()
        needed = stages is not None or self.negatives in OWN
        self._check("num_negatives", needed, f"say how many {self.negatives} negatives a row gets")
        self._check("mine_every", self.mine_every >= 1, "it must be 1 or above")
        most = stages[-1][1] if stages else 0
        batch = self.per_device_train_batch_size
        misfit = negatives_misfit(self.negatives, most, batch, self.weigh_negatives, self.mine_every, self.mine_pool)
        if misfit is not None:
            name, remedy = misfit
            self._check("per_device_train_batch_size" if name == "batch" else name, False, remedy)

    def stages(self) -> list[tuple[float, int]] | None:
        """Starts of the stages as shares of training, and negatives in each; None for all that rows have."""
        counts = self.negative_stages if self.num_negatives is None else [self.num_negatives]
        return None if counts is None else stages_of_negatives(counts)

    def _check(self, name: str, possible: bool, remedy: str) -> None:
        if not possible:
            raise UserError(f"SoftmaxDPOConfig({name}={getattr(self, name)!r}) is not possible: {remedy}")
