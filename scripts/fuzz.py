"""Fuzz a reader by coverage: atheris mutates sound inputs, and keeps those that reach new code.

    pip install atheris
    python scripts/fuzz.py recipe --runs 20000

Targets are those of ``tests/fuzz_targets.py``; without one, their names are listed. A failure ends the run: it prints
the traceback, and leaves the input in ``crash-...`` here.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from random import Random

os.environ.setdefault("POLARS_MAX_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> None:
    import atheris

    words = argparse.ArgumentParser(description="Fuzz a reader by coverage.")
    words.add_argument("target", nargs="?")
    words.add_argument("--runs", type=int, default=20_000)
    words.add_argument("--seed", type=int, default=1)
    given = words.parse_args()
    with atheris.instrument_imports(include=["rankwise", "yaml"]):
        from fuzz_mutations import mutated
        from fuzz_targets import SECONDS, TARGETS, check

        if given.target not in TARGETS:
            sys.exit(f"targets: {', '.join(TARGETS)}")
        target = TARGETS[given.target]
        folder = Path(tempfile.mkdtemp())
        for content in target.seeds:  # so that what is imported lazily is instrumented too, and takes no run's time
            for name, other in {**target.beside, target.name: content}.items():
                (folder / name).write_bytes(other)
            target.read(folder / target.name)

    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(content)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        changed = mutated(content, random) if random.random() < 0.7 else atheris.Mutate(content, len(content))
        return changed[:most]

    options = [f"-runs={given.runs}", f"-seed={given.seed}", f"-timeout={2 * SECONDS}", "-max_len=65536"]
    limits = ["-rss_limit_mb=4096", "-len_control=0", "-print_final_stats=1", str(corpus)]
    atheris.Setup(
        [sys.argv[0], *options, *limits], lambda content: check(target, folder, content), custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
