"""Settings of rejected answers that fit together: the same for recipes and for the trainer."""

from __future__ import annotations


def negatives_misfit(
    draw: str, most: int, batch: int, weigh: bool, mine_every: int, mine_pool: int | None
) -> tuple[str, str] | None:
    """What does not fit, by the name of its setting, and the remedy; None where all fits.

    Args:
        draw: kind of the rejected answers.
        most: rejected answers of a row, at the end.
        batch: rows of a batch.
        weigh: whether draws are corrected for their chances.
        mine_every: steps for which hard answers are mined at once.
        mine_pool: answers that are ranked to mine; None for all.
    """
    if draw == "in-batch" and batch <= most:
        return "batch", f"{most} negatives of a batch need {most + 1} rows in it"
    if weigh and draw != "popularity":
        return "weigh_negatives", f"{draw} negatives all have one chance: only popularity's have not"
    if draw != "hard" and mine_every != 1:
        return "mine_every", "it is for hard negatives only"
    if draw != "hard" and mine_pool is not None:
        return "mine_pool", "it is for hard negatives only"
    if mine_pool is not None and mine_pool < most:
        return "mine_pool", f"{most} negatives are mined from it; None is the whole catalogue"
    return None
