"""The other domain of `encoders.yaml`: film reviews, for models that learnt from phrases of reviews.

    python benchmarks/encoder_reviews.py

reads `$RANKWISE_DATA` (`../shared/data` if not set) and writes `runs/reviews.parquet`.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

ROWS = 500
OUT = Path("runs/reviews.parquet")


def main() -> None:
    """Write the file."""
    texts = Path(os.environ.get("RANKWISE_DATA", "../shared/data")) / "text"
    parts = []
    for name, label in (("pos", "positive"), ("neg", "negative")):
        column = pl.read_parquet(texts / f"imdb-test-{name}.parquet", columns=["text"])["text"].head(ROWS // 2)
        words = column.str.replace_all("<br />", " ", literal=True)
        parts.append(pl.DataFrame({"sentence1": words}).with_columns(label=pl.lit(label)))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    pl.concat(parts).write_parquet(OUT)
    print(f"{OUT}: {ROWS:,} reviews")


if __name__ == "__main__":
    main()
