"""What rankwise says of the leak of triplets beside what it is, over weights that make it hard.

Every spectrum, shape, type, rank and end, the fast way allowed at any size. The true leak is by numpy's SVD in float64;
directions whose value is that of the last wanted one to a millionth count as wanted.

    python benchmarks/bench_leak.py
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rankwise.directions.solvers import choice, decompose
from timing import machine, table

SHAPES = [(400, 400), (520, 400), (700, 700), (900, 600)]
TYPES = [torch.float32, torch.float64, torch.bfloat16]
RANKS = [1, 4, 12, 32, 48]
HEAD = [
    "weight",
    "decomposed",
    "by a fast method",
    "leaked more than 1e-6 and than said",
    "by at most",
    "above its tolerance",
]
Case = tuple[str, tuple[int, int], Tensor]


def spectra(n: int) -> dict[str, np.ndarray]:
    """Singular values, ascending."""
    k = np.arange(1, n + 1)
    line = k / n
    return {
        "linear": line,
        "power law": 1.0 / k[::-1],
        "steep power law": 1.0 / k[::-1] ** 2,
        "exponential": np.exp(-k[::-1] / 30),
        "jump": np.where(k <= 12, 1e-5, line),
        "small jump": np.where(k <= 12, 3e-7, line),
        "jump to zero": np.where(k <= 12, 0.0, line),
        "one zero": np.where(k <= 1, 0.0, line),
        "clustered": np.where(k > 40, 1.0, 0.5) * (1 + 1e-6 * np.sin(k)),
        "outliers": np.where(k > n - 3, 1e3, line),
        "rank-deficient": np.where(k <= 50, 0.0, line),
        "repeated": np.where(k > n // 2, 1.0, 0.25),
    }


def cases() -> Iterator[Case]:
    """Weights in float64: of given spectra, and Gaussian ones that were spoiled."""
    for m, n in SHAPES:
        draw = np.random.default_rng(m).standard_normal
        left, right = (np.linalg.qr(draw((side, n)))[0] for side in (m, n))
        for name, values in spectra(n).items():
            yield name, (m, n), torch.tensor((left * values) @ right.T)
        plain = torch.tensor(draw((m, n)))
        scale = torch.linspace(0, -1.5, m)[:, None] + torch.linspace(0, -1.5, n)[None, :]
        yield "Gaussian", (m, n), plain
        yield "decaying", (m, n), plain * 10**scale
        yield "centred", (m, n), plain - plain.mean(dim=1, keepdim=True)
        doubled = plain.clone()
        doubled[:, 1] = doubled[:, 0]
        yield "doubled column", (m, n), doubled


def true_leak(vectors: Tensor, basis: np.ndarray, s: np.ndarray, smallest: bool) -> float:
    """Root mean square sine between vectors and the wanted singular directions; ``s`` descends."""
    rank = vectors.shape[1]
    beyond = s > s[-rank] * (1 + 1e-6) + 1e-12 * s[0] if smallest else s < s[rank - 1] * (1 - 1e-6)
    return float(np.linalg.norm(basis[:, beyond].T @ vectors.numpy()) / rank**0.5)


def row(name: str, weights: list[Tensor]) -> list[str]:
    """A line of the table: all shapes, types, ranks and both ends of a kind of weight."""
    total = fast = above = 0
    ratios = []
    for weight, dtype in itertools.product(weights, TYPES):
        cast = weight.to(dtype)
        u, s, vh = np.linalg.svd(cast.double().numpy(), full_matrices=False)
        tolerance = 1e-7 if dtype == torch.float64 else 1e-3
        for rank, smallest in itertools.product(RANKS, (True, False)):
            picked = list(range(len(s) - 1, len(s) - 1 - rank, -1)) if smallest else list(range(rank))
            found = decompose(cast, picked)
            total += 1
            if found.leak is None:
                continue
            fast += 1
            true = max(true_leak(found.U, u, s, smallest), true_leak(found.V, vh.T, s, smallest))
            above += true > tolerance
            if true > max(found.leak, 1e-6):
                ratios.append(true / found.leak)
    return [name, str(total), str(fast), str(len(ratios)), f"{max(ratios):.2f}" if ratios else "-", str(above)]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    choice.LEAST_SIDE, choice.LARGEST_SHARE["tall"] = 384, 8
    kinds: dict[str, list[Tensor]] = {}
    for name, _, weight in cases():
        kinds.setdefault(name, []).append(weight)
    print(machine(given.threads), flush=True)
    print(table(HEAD, [row(name, weights) for name, weights in kinds.items()]))


if __name__ == "__main__":
    main()
