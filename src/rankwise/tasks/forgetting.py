"""What a model forgot: its loss on texts, and its scores on tasks, that it was not trained for, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.sampling import sample
from rankwise.tasks.language_loss import answer_loss
from rankwise.tasks.task import Metrics, Task
from rankwise.tasks.text import as_features, pack, read_documents


class HeldOut:
    """Texts, with a language model's mean cross-entropy in nats a token, and tasks, with their scores, by name.

    The base model's row of the results has what it was before; the difference is what was forgotten.

    Attributes:
        rows: of each text, encoded.
        counts: of rows that were left out.

    Args:
        files: a ``.txt`` file or a table with a column ``text``, by name.
        tokenizer: the model's.
        context: tokens of a row.
        rows: most rows of each text, drawn by ``seed``; all where None.
        seed: of the draw.
        tasks: other data to measure on, of which nothing is trained on.

    Raises:
        UserError: a file is missing or holds no text.

    Source: the measure of forgetting of MiLoRA (arXiv 2406.09044), after arXiv 2401.05605.
    """

    def __init__(
        self,
        files: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        rows: int | None,
        seed: int,
        tasks: Mapping[str, Task] | None = None,
    ) -> None:
        self._tasks = tasks or {}
        self.counts = {
            f"{name}: {what}": number for name, task in self._tasks.items() for what, number in task.counts.items()
        }
        self.rows = {}
        for name, path in files.items():
            packed = pack(read_documents(Path(path))[0], tokenizer, context)
            self.rows[name], left_out = sample(as_features(packed), rows, seed)
            if left_out:
                self.counts[f"{name}: rows left out"] = left_out

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics."""
        others = (f"{name} {column}" for name, task in self._tasks.items() for column in task.columns)
        return (*(f"{name} loss" for name in self.rows), *others)

    def measure(self, model: nn.Module) -> Metrics:
        """The loss on each text, and the metrics of each task."""
        found = {f"{name} loss": answer_loss(model, rows)["loss"] for name, rows in self.rows.items()}
        for name, task in self._tasks.items():
            found |= {f"{name} {metric}": value for metric, value in task.evaluate(model).metrics.items()}
        return found
