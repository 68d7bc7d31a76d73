"""What a recipe asks of several processes that they cannot do, told before anything is loaded."""

from __future__ import annotations

from rankwise.errors import UserError
from rankwise.processes import Processes
from rankwise.schema import AllocatingLoraSettings, Recipe, SoftmaxDpoStage


def check_shared_out(recipe: Recipe, processes: Processes) -> None:
    """See that each step's rows can be shared out, and that the adapter may be trained by so many.

    Raises:
        UserError: a batch does not come out even, or a process's rows are too few to draw each other's answers; or an
            adapter is for one process.
    """
    if processes.number == 1:
        return
    if isinstance(recipe.adapter, AllocatingLoraSettings):
        raise UserError(
            f"adapter.kind {recipe.adapter.kind} changes the shapes of matrices while they are trained, which the "
            f"wrappers of {processes.number} processes hold: train in one process"
        )
    for stage in recipe.stages:
        rows = processes.share_of(stage.batch_size, f"stages: {stage.name}: batch_size")
        if not isinstance(stage, SoftmaxDpoStage) or stage.draw != "in-batch":
            continue
        if stage.most_negatives >= rows:
            raise UserError(
                f"stages: {stage.name}: {stage.most_negatives} negatives in-batch are drawn from the other rows of a "
                f"process, which has {rows} of batch_size {stage.batch_size}: give a batch_size of "
                f"{processes.number * (stage.most_negatives + 1)} or more"
            )
