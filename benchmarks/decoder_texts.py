"""The texts of `decoders.yaml`: stories to learn, others to measure, and film reviews as the model was pretrained on.

    python benchmarks/decoder_texts.py

reads `$RANKWISE_DATA` (`../shared/data` if not set) and writes `runs/stories`. The reviews are of the test split, which
the shipped model has never seen, with line breaks for their HTML as in its pretraining.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import polars as pl

from rankwise.tasks.text import read_documents

END = "<|endoftext|>"
HELD_OUT, REVIEWS = 300, 1000
OUT = Path("runs/stories")


def main() -> None:
    """Write the three files."""
    texts = Path(os.environ.get("RANKWISE_DATA", "../shared/data")) / "text"
    OUT.mkdir(parents=True, exist_ok=True)
    stories, _ = read_documents(texts / "tinystories.txt", separator=END)
    stories = sorted(set(stories))
    random.Random(0).shuffle(stories)
    reviews: list[str] = []
    for name in ("pos", "neg"):
        column = pl.read_parquet(texts / f"imdb-test-{name}.parquet", columns=["text"])["text"].head(REVIEWS // 2)
        reviews += column.str.replace_all("<br />", "\n", literal=True).str.replace_all(r"\n{3,}", "\n\n").to_list()
    parts = {"train": stories[HELD_OUT:], "held_out": stories[:HELD_OUT], "reviews": reviews}
    for name, documents in parts.items():
        pl.DataFrame({"text": documents}).write_parquet(OUT / f"{name}.parquet")
        print(f"{OUT / name}.parquet: {len(documents):,} documents")


if __name__ == "__main__":
    main()
